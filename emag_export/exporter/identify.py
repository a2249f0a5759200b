"""Identify a build before it is performed: source, contract and versions decide the key of a bundle.

Nothing here imports torch, diffusers or onnx: that takes seconds, and most calls of ``build`` in a script or
a notebook find their bundle finished.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from emag_export import __version__
from emag_export.bundle import MANIFEST, Bundle, Provenance
from emag_export.contract import DenoiserContract, Renorm, Variant
from emag_export.errors import EmagError, InputError
from emag_export.exporter.source import SourceModel, find_source
from emag_export.hashing import hash_json
from emag_export.models import SamplingDefaults, sampling_defaults

__all__ = [
    "OPSET",
    "BuildOptions",
    "BuildPlan",
    "BuildProgress",
    "contract_of",
    "finished_bundle",
    "identify",
]

OPSET = 20
"""The oldest with ``Gelu`` as one operator; runs on onnxruntime, TensorRT and TensorRT-RTX alike."""

BuildProgress = Callable[[str, str], None]
"""Called with (component, phase) when a phase begins: reuse, load, trace, verify, copy, hash, done."""

_PRECISIONS = ("float32", "float16", "bfloat16")
_VERSIONED = ("torch", "diffusers", "transformers", "onnx", "onnxscript")
"""Packages whose version may change a graph; read from their metadata, so that none is imported."""


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """What the user may choose."""

    variant: Variant = Variant.EMAG_Q
    renorm: Renorm = Renorm.ROW
    blocks: tuple[int, ...] | None = None
    """Candidate blocks; None takes the model's defaults."""
    precision: str = "float32"
    revision: str | None = None
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True)
class BuildPlan:
    """Everything that decides what a bundle holds, and nothing about where it is written."""

    source: SourceModel
    contract: DenoiserContract
    defaults: SamplingDefaults
    provenance: Provenance
    key: str
    """SHA-256 over the other fields and the opset; a bundle with this key need not be made again."""


def identify(model: str, options: BuildOptions, on_progress: BuildProgress) -> BuildPlan:
    """Find ``model`` and say which bundle the options ask for. Nothing is written.

    Args:
        model: Known name, diffusers folder or hub id; a hub model is downloaded if it is not in the cache.
        options: See there; ``overwrite`` does not matter here.
        on_progress: Told when hashing begins; a large checkpoint takes a minute.

    Raises:
        ModelError: If the model cannot be used.
        InputError: If an option cannot be used.
    """
    source = find_source(model, revision=options.revision)
    contract, defaults = _contract(source, options)
    on_progress("source", "hash")
    provenance = Provenance(
        model=source.name,
        revision=source.revision,
        fingerprint=source.fingerprint(),
        versions={"emag-export": __version__, **{name: version(name) for name in _VERSIONED}},
    )
    key = hash_json([asdict(provenance), contract.to_json(), defaults.to_json(), OPSET])
    return BuildPlan(source=source, contract=contract, defaults=defaults, provenance=provenance, key=key)


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
        if bundle.manifest.get("key") != key:
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
    pixels = config["sample_size"] * 2 ** (len(source.config("vae")["block_out_channels"]) - 1)
    defaults = sampling_defaults(source.name, blocks=config["num_layers"], sample_pixels=pixels)
    if options.precision not in _PRECISIONS:
        raise InputError(f"there is no precision {options.precision!r}; choose float32, float16 or bfloat16")
    blocks = defaults.emag_layers if options.blocks is None else options.blocks
    contract = contract_of(
        config, variant=options.variant, blocks=blocks, renorm=options.renorm, precision=options.precision
    )
    return contract, defaults
