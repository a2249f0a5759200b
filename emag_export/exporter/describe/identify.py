"""Identify a build before it is performed: source, contract and versions decide the key of a bundle.

Nothing here imports torch, diffusers or onnx: that takes seconds, and most calls of ``build`` in a script or
a notebook find their bundle finished.
"""

from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from emag_export.bundle import MANIFEST, Bundle
from emag_export.contract import DenoiserContract
from emag_export.errors import EmagError, InputError
from emag_export.exporter.describe.components import check_text_length, choose_components
from emag_export.exporter.describe.quantised import (
    check_calibration,
    default_precision,
    quantisation_of,
    quantisation_recipe,
)
from emag_export.exporter.describe.recipes import GRAPHS, OPSETS, PREVIEW_FIT, QUANTISED
from emag_export.exporter.source.find import find_source
from emag_export.exporter.source.lora import lora_records
from emag_export.exporter.source.random_model import random_model
from emag_export.families import FAMILIES, sampling_defaults
from emag_export.families.source_model import SourceModel
from emag_export.hashing import hash_json
from emag_export.labels import ClassLabels
from emag_export.manifest import Provenance
from emag_export.models import SamplingDefaults
from emag_export.options import BuildOptions, Lora
from emag_export.packages import require_packages
from emag_export.progress import Event, Progress, silent
from emag_export.quantisation import Quantisation
from emag_export.shared_encoders import shared_files
from emag_export.sizes import Geometry
from emag_export.version import VERSION

__all__ = ["BuildPlan", "finished_bundle", "identify", "resolve"]

_VERSIONED = ("torch", "diffusers", "transformers", "onnx", "onnxscript")
"""Packages whose version may change a graph; read from their metadata, so that none is imported."""


@dataclass(frozen=True, kw_only=True)
class BuildPlan:
    """Everything that decides what a bundle holds, and nothing about where it is written."""

    source: SourceModel
    contract: DenoiserContract
    defaults: SamplingDefaults
    geometry: Geometry
    labels: ClassLabels | None
    """Classes that prompts name; None where they are text."""
    components: tuple[str, ...]
    """Graphs that the bundle holds."""
    encoders: Bundle | None
    """Holds the other components, where they are shared."""
    shared: tuple[str, ...]
    """Components used from there."""
    loras: tuple[Lora, ...]
    quantisation: Quantisation | None
    """How the denoiser is quantised; None where it is not."""
    provenance: Provenance
    key: str
    """SHA-256 over the fields above and the recipes; a bundle with this key need not be made again."""


def identify(model: str, options: BuildOptions, progress: Progress = silent) -> BuildPlan:
    """Find ``model`` and say which bundle the options ask for. Nothing is written.

    Args:
        model: Known name, diffusers folder or hub id; a hub model is downloaded if it is not in the cache.
        options: See there.
        progress: Told when hashing begins; a large checkpoint takes a minute.

    Raises:
        ModelError: If the model cannot be used.
        InputError: If an option cannot be used.
        MissingDependencyError: If a package that exporting needs is absent.
    """
    require_packages("accelerate", "onnx", "onnxscript", "onnxruntime", purpose="exporting")
    source = resolve(model, revision=options.revision, seed=options.weights_seed)
    _check_settings(source, options)
    encoders = None if options.encoders is None else Bundle(options.encoders)
    decoder = source.family.component(source.family.decoder)
    pixels = source.family.latents(source.config(decoder.folder)).pixels_per_latent
    defaults = _defaults(source, options, pixels)
    contract = _contract(source, options, defaults)
    components, shared = choose_components(source, options, encoders)
    check_text_length(defaults, encoders, shared)
    progress(Event(component="source", phase="hash"))
    provenance = Provenance(
        model=source.name,
        revision=source.revision,
        fingerprint=source.fingerprint(),
        versions={"emag-export": VERSION, **{name: version(name) for name in _VERSIONED}},
        seed=options.weights_seed,
        loras=lora_records(options.loras),
        timestep_shift=options.timestep_shift,
    )
    geometry = Geometry(pixels_per_latent=pixels, text=source.family.text(source.config, defaults))
    labels = _labels(source)
    recipe: list[Any] = [asdict(contract), asdict(defaults), asdict(geometry), components]
    recipe += [OPSETS[contract.precision], GRAPHS, PREVIEW_FIT]
    if labels is not None:
        recipe.append(asdict(labels))
    if encoders is not None:
        recipe.append(shared_files(encoders, shared))
    quantisation = quantisation_of(options, contract, defaults, labels)
    if quantisation is not None:
        check_calibration(quantisation, contract, geometry)
        recipe += [QUANTISED, quantisation_recipe(quantisation)]
    return BuildPlan(
        source=source,
        contract=contract,
        defaults=defaults,
        geometry=geometry,
        labels=labels,
        components=components,
        encoders=encoders,
        shared=shared,
        loras=options.loras,
        quantisation=quantisation,
        provenance=provenance,
        key=hash_json([asdict(provenance), *recipe]),
    )


def resolve(model: str, *, revision: str | None, seed: int | None) -> SourceModel:
    """The source model: the checkpoint, or its configuration with random weights where a seed is given.

    Raises:
        ModelError: If there is no such model.
    """
    return find_source(model, revision=revision) if seed is None else random_model(model, seed)


def finished_bundle(out: Path, key: str) -> Bundle | None:
    """The bundle at ``out`` if it is whole and was made from the same inputs.

    A bundle that is damaged counts as none: ``build`` then says what is in its way.

    Args:
        out: Where the bundle would be.
        key: Of :class:`BuildPlan`.
    """
    if not (out / MANIFEST).is_file():
        return None
    try:
        bundle = Bundle(out)
        if bundle.key != key:
            return None
        bundle.check()
    except EmagError:
        return None
    return bundle


def _defaults(source: SourceModel, options: BuildOptions, pixels: int) -> SamplingDefaults:
    family, length = source.family, options.max_sequence_length
    defaults = sampling_defaults(
        source.name, family, source.config("transformer"), options.variant, pixels_per_latent=pixels
    )
    if length is None:
        return defaults
    if not family.longest_text:
        raise InputError(f"{family.title} takes no text; leave out `max_sequence_length`")
    if not 1 <= length <= family.longest_text:
        raise InputError(
            f"`max_sequence_length` is {length}; {family.title} takes 1 to {family.longest_text} tokens"
        )
    return replace(defaults, max_sequence_length=length)


def _check_settings(source: SourceModel, options: BuildOptions) -> None:
    every = {name for family in FAMILIES.values() for name in family.settings}
    for name in sorted(every.difference(source.family.settings)):
        if getattr(options, name) is not None:
            having = ", ".join(family.title for family in FAMILIES.values() if name in family.settings)
            raise InputError(f"`{name}` is for {having}, and {source.name} is none of it; leave it out")


def _labels(source: SourceModel) -> ClassLabels | None:
    find = source.family.labels
    return None if find is None else find(source.index, source.config("transformer"))


def _contract(source: SourceModel, options: BuildOptions, defaults: SamplingDefaults) -> DenoiserContract:
    return source.family.contract(
        source.config("transformer"),
        variant=options.variant,
        blocks=defaults.candidates if options.emag_candidates is None else options.emag_candidates,
        renorm=options.renorm,
        precision=options.precision or default_precision(options.quantize, source.precision()),
        state_dtype=options.state_precision,
    )
