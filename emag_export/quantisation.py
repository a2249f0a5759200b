"""Schemes of quantisation: what each rounds, where it runs, and how it is calibrated. A table of facts.

The pass that applies a scheme to a graph is :mod:`emag_export.exporter.quantise`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from emag_export.errors import InputError
from emag_export.records import FORMAT_VERSION

__all__ = ["SCHEMES", "Calibration", "Quantisation", "Ranges", "Scheme", "SchemeFacts"]


class Scheme(StrEnum):
    """How the linears of a denoiser's blocks are rounded."""

    W8 = "w8"
    """Weights to int8, per output channel; activations stay as they are."""
    FP8 = "fp8"
    """Weights and activations to FP8 (e4m3), activations with calibrated ranges."""
    INT8 = "int8"
    """Weights and activations to int8, activations per token with the range they have."""


@dataclass(frozen=True, kw_only=True)
class SchemeFacts:
    """What a scheme rounds, and what can run it."""

    precisions: tuple[str, ...]
    """Of what is not rounded."""
    backends: tuple[str, ...]
    """What it is made for; a GPU's graph runs in onnxruntime too, for comparison."""
    capability: tuple[int, int] | None = None
    """Oldest compute capability of a GPU that multiplies such numbers; None: any."""
    calibrated: bool = False
    """Whether the ranges of activations are measured when it is built."""
    summary: str


_GPU = ("tensorrt", "tensorrt-rtx")
_HALF = ("float16", "bfloat16")

SCHEMES: Mapping[Scheme, SchemeFacts] = MappingProxyType(
    {
        Scheme.W8: SchemeFacts(
            precisions=("float32", *_HALF),
            backends=_GPU,
            summary="int8 weights",
        ),
        Scheme.FP8: SchemeFacts(
            precisions=("float32", *_HALF),
            backends=_GPU,
            capability=(8, 9),
            calibrated=True,
            summary="FP8 (e4m3) weights and activations, int8 weights of the modulation",
        ),
        Scheme.INT8: SchemeFacts(
            precisions=("float32",),
            backends=("onnxruntime",),
            summary="int8 weights and activations, for CPUs",
        ),
    }
)
"""By scheme. Integer activations are no scheme for GPUs: TensorRT-RTX lists int8 as weight-only, and FP8 has
the wider range."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What the ranges of activations are measured on."""

    prompts: tuple[str, ...]
    steps: int
    """Of one denoising run per prompt; a range is the largest value over all of them."""
    pixels: int
    """Along a side of the picture."""
    file: str | None = None
    """Where the prompts were read from, as the user gave it; None for the built-in ones."""


@dataclass(frozen=True, kw_only=True)
class Ranges:
    """What ``calibration/ranges.json`` of a bundle says."""

    format_version: int = FORMAT_VERSION
    largest: Mapping[str, float]
    """Linear, or attention and its part, to its largest absolute value in the calibration."""


@dataclass(frozen=True, kw_only=True)
class Quantisation:
    """How a denoiser was quantised."""

    scheme: Scheme
    attention: bool = False
    """Whether queries, keys, softmax and values are FP8 too."""
    calibration: Calibration | None = None
    """For schemes that are calibrated."""

    @property
    def facts(self) -> SchemeFacts:
        """The row of the table of schemes."""
        return SCHEMES[self.scheme]

    def describe(self) -> str:
        """In words."""
        words = self.facts.summary + ("; attention too" if self.attention else "")
        found = self.calibration
        if found is None:
            return words
        prompts = f"{len(found.prompts)} {'built-in ' if found.file is None else ''}prompts"
        return f"{words}; ranges over {prompts}, {found.steps} steps, {found.pixels} pixels"

    def check_capability(self, name: str, capability: tuple[int, int]) -> None:
        """Refuse a GPU that does not multiply numbers of this scheme.

        Args:
            name: Of the GPU or target, for the error.
            capability: Its compute capability.

        Raises:
            InputError: With what to build instead.
        """
        wanted = self.facts.capability
        if wanted is not None and capability < wanted:
            raise InputError(
                f"{name} has no {self.scheme} arithmetic, which begins with compute capability "
                f"{wanted[0]}.{wanted[1]}; build with `quantize` {Scheme.W8}"
            )

    def check_backend(self, backend: str) -> None:
        """Refuse a builder of engines that the scheme is not made for.

        Raises:
            InputError: With what to build instead.
        """
        if backend not in self.facts.backends:
            raise InputError(
                f"this bundle is quantised as {self.scheme}, for {' and '.join(self.facts.backends)}; for "
                f"{backend}, build with `quantize` {Scheme.W8} or {Scheme.FP8}"
            )
