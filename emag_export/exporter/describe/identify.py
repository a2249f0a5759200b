"""Identify a build before it is performed: source, contract and versions decide the key of a bundle.

Nothing here imports torch, diffusers or onnx: that takes seconds, and most calls of ``build`` in a script or
a notebook find their bundle finished.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

from emag_export import __version__
from emag_export.bundle import COMPONENTS, DENOISER, MANIFEST, Bundle
from emag_export.contract import PRECISIONS, STATE_PRECISIONS, DenoiserContract, Renorm, Variant, member
from emag_export.errors import EmagError, InputError
from emag_export.exporter.source.find import SourceModel, find_source
from emag_export.exporter.source.lora import Lora, lora_records
from emag_export.exporter.source.random_model import random_model
from emag_export.hashing import hash_json
from emag_export.manifest import Geometry, Provenance
from emag_export.models import SamplingDefaults, sampling_defaults
from emag_export.packages import require_packages
from emag_export.shared_encoders import shared_files

__all__ = [
    "GRAPHS",
    "OPSETS",
    "PREVIEW_FIT",
    "BuildOptions",
    "BuildPlan",
    "BuildProgress",
    "arguments_of",
    "contract_of",
    "finished_bundle",
    "identify",
    "resolve",
]

OPSETS: Mapping[str, int] = MappingProxyType({"float32": 20, "float16": 20, "bfloat16": 22})
"""Precision to the opset of its graphs. 20 is the oldest with ``Gelu`` as one operator, and runs on
onnxruntime, TensorRT and TensorRT-RTX alike; 22 is the oldest in which ``Conv`` takes bfloat16."""

GRAPHS = 2
"""Raised when the same model and options give another graph than before: a change of the fork, of a rule of
:mod:`emag_export.exporter.graph.passes`, of how things are traced."""

PREVIEW_FIT = 1
"""Raised when the fit of the previews changes: a bundle with the older numbers, or none, is made again."""

BuildProgress = Callable[[str, str], None]
"""Called with (component, phase) when a phase begins: reuse, load, trace, verify, copy, fit, hash, done."""

LONGEST_SEQUENCE = 512
"""T5 tokens; the limit of diffusers' pipeline."""

_T5 = "text_encoder_3"
_VERSIONED = ("torch", "diffusers", "transformers", "onnx", "onnxscript")
"""Packages whose version may change a graph; read from their metadata, so that none is imported."""


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """What the user may choose."""

    variant: Variant = Variant.EMAG_Q
    renorm: Renorm = Renorm.ROW
    blocks: tuple[int, ...] | None = None
    """Candidate blocks; None takes the model's defaults."""
    precision: str | None = None
    """float32, float16 or bfloat16; None takes the model's own."""
    state_precision: str = "float32"
    """In which the averages are kept between two steps; within a step they are float32."""
    revision: str | None = None
    seed: int | None = None
    """Random weights of this seed instead of the checkpoint's."""
    components: tuple[str, ...] | None = None
    """Graphs to export, by folder in the bundle; None exports all that the model has."""
    encoders: Path | None = None
    """A finished bundle whose text encoders, tokenizers and decoder are used instead of exporting them."""
    loras: tuple[Lora, ...] = ()
    """Merged into the transformer, in order."""
    t5: bool = True
    """Whether the T5 encoder is exported; without it zeros stand in its place, as in diffusers."""
    max_sequence_length: int | None = None
    """Tokens of the T5 part; None takes the model's default."""
    overwrite: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "variant", member(Variant, self.variant, "variant"))
        object.__setattr__(self, "renorm", member(Renorm, self.renorm, "renorm"))


def arguments_of(model: str, options: BuildOptions) -> tuple[str, ...]:
    """The words after ``emag-export build`` that mean these options; ``overwrite`` is left out.

    Args:
        model: Known name, diffusers folder or hub id.
        options: Those at their default get no words, except the variant.
    """
    words = ["--model", model, "--variant", str(options.variant)]
    if options.precision is not None:
        words += [
            "--precision",
            next(name for name, dtype in PRECISIONS.items() if dtype == options.precision),
        ]
    if options.blocks is not None:
        words += ["--emag-layers", ",".join(map(str, options.blocks))]
    if options.state_precision != BuildOptions.state_precision:
        state = next(name for name, dtype in STATE_PRECISIONS.items() if dtype == options.state_precision)
        words += ["--state-precision", state]
    if options.renorm != BuildOptions.renorm:
        words += ["--renorm", str(options.renorm)]
    if options.seed is not None:
        words += ["--weights", "random", "--seed", str(options.seed)]
    if options.components is not None:
        words += ["--components", ",".join(options.components)]
    if options.encoders is not None:
        words += ["--encoders", str(options.encoders)]
    for lora in options.loras:
        words += ["--lora", f"{lora.path}:{lora.scale}"]
    if not options.t5:
        words += ["--no-t5"]
    if options.max_sequence_length is not None:
        words += ["--max-sequence-length", str(options.max_sequence_length)]
    if options.revision is not None:
        words += ["--revision", options.revision]
    return tuple(words)


@dataclass(frozen=True, kw_only=True)
class BuildPlan:
    """Everything that decides what a bundle holds, and nothing about where it is written."""

    source: SourceModel
    contract: DenoiserContract
    defaults: SamplingDefaults
    geometry: Geometry
    components: tuple[str, ...]
    """Graphs that the bundle holds."""
    encoders: Bundle | None
    """Holds the other components, where they are shared."""
    shared: tuple[str, ...]
    """Components used from there."""
    loras: tuple[Lora, ...]
    provenance: Provenance
    key: str
    """SHA-256 over the fields above and the recipes; a bundle with this key need not be made again."""
    arguments: tuple[str, ...]
    """Of ``emag-export build``, with blocks, precision and revision as found; no part of the key."""

    @property
    def vae_factor(self) -> int:
        """Pixels per latent along a side."""
        return self.geometry.vae_factor

    @property
    def clip_tokens(self) -> int:
        """Tokens that CLIP makes of every prompt."""
        return self.geometry.clip_tokens


def identify(model: str, options: BuildOptions, on_progress: BuildProgress) -> BuildPlan:
    """Find ``model`` and say which bundle the options ask for. Nothing is written.

    Args:
        model: Known name, diffusers folder or hub id; a hub model is downloaded if it is not in the cache.
        options: See there; ``overwrite`` does not matter here.
        on_progress: Told when hashing begins; a large checkpoint takes a minute.

    Raises:
        ModelError: If the model cannot be used.
        InputError: If an option cannot be used.
        MissingDependencyError: If a package that exporting needs is absent.
    """
    require_packages("accelerate", "onnx", "onnxscript", "onnxruntime", purpose="exporting")
    source = resolve(model, revision=options.revision, seed=options.seed)
    contract, defaults = _contract(source, options)
    encoders = None if options.encoders is None else Bundle(options.encoders)
    components, shared = _components(source, options, encoders)
    _check_text_length(defaults, encoders, shared)
    on_progress("source", "hash")
    provenance = Provenance(
        model=source.name,
        revision=source.revision,
        fingerprint=source.fingerprint(),
        versions={"emag-export": __version__, **{name: version(name) for name in _VERSIONED}},
        seed=options.seed,
        loras=lora_records(options.loras),
    )
    recipe: list[Any] = [asdict(contract), asdict(defaults), components]
    recipe += [OPSETS[contract.precision], GRAPHS, PREVIEW_FIT]
    if encoders is not None:
        recipe.append(shared_files(encoders, shared))
    chosen = replace(options, blocks=contract.blocks, precision=contract.precision, revision=source.revision)
    return BuildPlan(
        source=source,
        contract=contract,
        defaults=defaults,
        geometry=Geometry(
            vae_factor=_vae_factor(source),
            clip_tokens=source.config("text_encoder")["max_position_embeddings"],
        ),
        components=components,
        encoders=encoders,
        shared=shared,
        loras=options.loras,
        provenance=provenance,
        key=hash_json([asdict(provenance), *recipe]),
        arguments=arguments_of(model, chosen),
    )


def resolve(model: str, *, revision: str | None, seed: int | None) -> SourceModel:
    """The source model: the checkpoint, or its configuration with random weights where a seed is given.

    Raises:
        ModelError: If there is no such model.
    """
    return find_source(model, revision=revision) if seed is None else random_model(model, seed)


def _vae_factor(source: SourceModel) -> int:
    return int(2 ** (len(source.config("vae")["block_out_channels"]) - 1))


def _components(
    source: SourceModel, options: BuildOptions, encoders: Bundle | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Components to export, and components to use from another bundle."""
    there = [name for name, folder in COMPONENTS.items() if source.has(folder)]
    for name in options.components or ():
        if name not in there:
            raise InputError(f"{source.name} has no component {name!r}; it has {', '.join(there)}")
    if options.components is not None and DENOISER not in options.components:
        raise InputError(f"a bundle is made around its {DENOISER}; add it to --components")
    if encoders is not None:
        if options.components is not None:
            raise InputError("--encoders says where the other components are; leave out --components")
        shared = (name for name in encoders.components if name != DENOISER)
        return (DENOISER,), tuple(name for name in shared if options.t5 or name != _T5)
    if "text_encoder" not in there and options.components is None:
        raise InputError(
            f"{source.name} has no text encoders; use those of a bundle with --encoders BUNDLE, or export "
            f"without them by --components {DENOISER}"
        )
    wanted = there if options.components is None else options.components
    return tuple(name for name in there if name in wanted and (options.t5 or name != _T5)), ()


def _check_text_length(defaults: SamplingDefaults, encoders: Bundle | None, shared: tuple[str, ...]) -> None:
    """A shared T5, and engines built of it, take no more tokens than their own bundle allows."""
    if encoders is None or _T5 not in shared:
        return
    longest = encoders.defaults.max_sequence_length
    if defaults.max_sequence_length > longest:
        raise InputError(
            f"max sequence length is {defaults.max_sequence_length}, the encoders of {encoders.path} were "
            f"made for {longest}; give --max-sequence-length {longest}"
        )


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


def contract_of(
    config: Mapping[str, Any],
    *,
    variant: Variant,
    blocks: tuple[int, ...],
    renorm: Renorm = Renorm.ROW,
    precision: str = "float32",
    state_dtype: str = "float32",
) -> DenoiserContract:
    """The contract of a model with this ``transformer/config.json``, forked at ``blocks[0]``.

    Raises:
        InputError: If a candidate block lies outside the model.
    """
    return DenoiserContract(
        variant=variant,
        renorm=renorm,
        blocks=blocks,
        precision=precision,
        state_dtype=state_dtype,
        num_blocks=config["num_layers"],
        heads=config["num_attention_heads"],
        head_dim=config["attention_head_dim"],
        in_channels=config["in_channels"],
        out_channels=config.get("out_channels") or config["in_channels"],
        patch_size=config["patch_size"],
        max_grid=config["pos_embed_max_size"],
        text_dim=config["joint_attention_dim"],
        pooled_dim=config["pooled_projection_dim"],
    )


def _contract(source: SourceModel, options: BuildOptions) -> tuple[DenoiserContract, SamplingDefaults]:
    config = source.config("transformer")
    pixels = config["sample_size"] * _vae_factor(source)
    defaults = sampling_defaults(source.name, blocks=config["num_layers"], sample_pixels=pixels)
    precision = source.precision() if options.precision is None else options.precision
    if precision not in PRECISIONS.values():
        raise InputError(f"there is no precision {precision!r}; choose float32, float16 or bfloat16")
    if options.state_precision not in STATE_PRECISIONS.values():
        raise InputError(f"averages cannot be kept in {options.state_precision!r}; choose float32 or float16")
    if options.max_sequence_length is not None:
        if not 1 <= options.max_sequence_length <= LONGEST_SEQUENCE:
            raise InputError(
                f"max sequence length is {options.max_sequence_length}; SD3 was trained with at most "
                f"{LONGEST_SEQUENCE} T5 tokens, give 1 to {LONGEST_SEQUENCE}"
            )
        defaults = replace(defaults, max_sequence_length=options.max_sequence_length)
    blocks = defaults.emag_layers if options.blocks is None else options.blocks
    contract = contract_of(
        config,
        variant=options.variant,
        blocks=blocks,
        renorm=options.renorm,
        precision=precision,
        state_dtype=options.state_precision,
    )
    return contract, defaults
