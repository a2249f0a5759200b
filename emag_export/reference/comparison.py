"""What a comparison found, which figures are allowed, and where they were exceeded. Plain data only."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import UInt8

from emag_export.runtime.plan import Phase

__all__ = [
    "THRESHOLDS",
    "Choice",
    "Comparison",
    "FreeStep",
    "PicturePair",
    "StepComparison",
    "TensorError",
    "Threshold",
]


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """How far an engine may lie from the float32 reference; a difference passes up to and including it."""

    velocity: float
    """Largest difference of a velocity in one teacher-forced step."""
    relative: bool
    """Whether ``velocity`` is a fraction of the largest reference velocity of that step."""
    average: float
    """Largest difference of E, as a fraction of its largest value."""
    delta: float | None
    """Largest difference of Delta, as a fraction of its largest value; None: reported, not judged."""
    tie: float | None
    """Blocks whose Delta differ by less than this fraction may be chosen either way; None: choices are
    reported, not judged."""
    free: float | None
    """Largest difference of latents in a free run while both sides choose alike; a differing choice is
    excused where Delta lead by less than this fraction. None: not judged."""


THRESHOLDS: Mapping[str, Threshold] = MappingProxyType(
    {
        "float32": Threshold(velocity=1e-4, relative=False, average=1e-4, delta=1e-4, tie=2e-5, free=1e-3),
        "float16": Threshold(velocity=0.02, relative=True, average=0.03, delta=None, tie=None, free=None),
        "bfloat16": Threshold(velocity=0.25, relative=True, average=0.15, delta=None, tie=None, free=None),
    }
)
"""By precision of the engine, the reference being float32.

float32: two models of 10 blocks, PyTorch and onnxruntime on a CPU. A velocity of size 2 to 17 differs by at
most 1.4e-5 in one step; 1e-4 leaves room for the 24 to 38 blocks and the processors of real models. E
differs by 4e-6 of its largest value and Delta by 4e-6 of its own, so that two Delta closer than twice that
may swap places; a tie allows 2e-5. A free run ended 8e-5 away after 8 guided steps while the choices agreed.

float16 rounds to 2^-11 = 5e-4, and a block rounds its residual stream about four times. Roundings add up
like a random walk: sqrt(4 * 24) * 5e-4 = 0.5 % for SD3-medium; measured 0.32 % for velocities at 10 blocks
and 0.8 % for E where a softmax is peaky, to be multiplied by sqrt(24 / 10). Two to four times that is
allowed, because the largest of many elements counts. bfloat16 rounds to 2^-8, eight times as coarse:
measured 10 % for velocities and 5 % for E at 10 blocks. In both, Delta and the choices are reported but not
judged: E - X is a small difference of large numbers, and rounding can change which is largest. Nor are free
runs, which part for good after one differing choice.
"""


@dataclass(frozen=True, kw_only=True)
class TensorError:
    """One output of an engine against the reference's, over all images."""

    max_abs: float
    relative: float
    """``max_abs`` as a fraction of the largest reference value; 0 where both are zero throughout."""
    cosine: float


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The block that each side's Delta makes lagged argmax choose in the next step, for one image."""

    reference: int
    engine: int
    gap: float
    """The reference's largest Delta minus its second largest, as a fraction of the largest; 0 is a tie."""

    @property
    def agree(self) -> bool:
        """Whether both name the same block."""
        return self.reference == self.engine


@dataclass(frozen=True, kw_only=True)
class StepComparison:
    """One teacher-forced step: the engine was fed the reference's own state."""

    index: int
    phase: Phase
    sigma: float
    errors: Mapping[str, TensorError]
    """By output: ``uncond``, ``cond``; ``perturbed`` while guiding; ``ema_state``, ``delta`` unless plain."""
    reference_delta: tuple[tuple[float, ...], ...]
    """Per image and candidate block."""
    engine_delta: tuple[tuple[float, ...], ...]
    choices: tuple[Choice, ...]
    """Per image; empty in a plain step, which measures no Delta."""


@dataclass(frozen=True, kw_only=True)
class FreeStep:
    """One step of a run in which the engine follows its own state and choices."""

    index: int
    phase: Phase
    max_abs: float
    """Largest difference of the latents after the step, latent units."""
    reference_blocks: tuple[tuple[int, ...], ...]
    """Blocks perturbed in this step, per image."""
    engine_blocks: tuple[tuple[int, ...], ...]

    @property
    def agree(self) -> bool:
        """Whether both sides perturbed the same blocks of every image."""
        return self.reference_blocks == self.engine_blocks


@dataclass(frozen=True, kw_only=True)
class PicturePair:
    """The finished picture of one image, from both sides."""

    reference: UInt8[np.ndarray, "height width 3"]
    engine: UInt8[np.ndarray, "height width 3"]
    psnr: float
    """Peak signal-to-noise ratio, dB; infinite for identical pictures."""
    ssim: float
    """Structural similarity, 1 for identical pictures."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """An engine against the reference."""

    settings: Mapping[str, str]
    """What was run, for people."""
    precision: str
    blocks: tuple[int, ...]
    """Candidate blocks, in the order of every Delta."""
    steps: tuple[StepComparison, ...]
    free: tuple[FreeStep, ...]
    pictures: tuple[PicturePair, ...] = ()

    @property
    def threshold(self) -> Threshold:
        """Of this precision."""
        return THRESHOLDS[self.precision]

    @property
    def passed(self) -> bool:
        """Whether nothing lies above its threshold."""
        return not self.failures()

    def failures(self) -> list[str]:
        """Every figure above its threshold, in words; empty when the comparison passed."""
        return [
            *(text for step in self.steps for text in self._step_failures(step)),
            *self._free_failures(),
        ]

    def ties(self) -> list[str]:
        """Differing choices that are excused, in words: the reference's own Delta are rounding apart."""
        return [
            f"step {step.index}: tie, the reference's Delta for image {image} differ by {choice.gap:.1e} "
            f"relative; reference block {choice.reference}, engine block {choice.engine}"
            for step in self.steps
            for image, choice in enumerate(step.choices)
            if not choice.agree and self._is_tie(choice)
        ]

    def to_json(self) -> dict[str, Any]:
        """Plain data, without the pictures themselves; a number that JSON lacks is its name."""
        data = asdict(self)
        data["pictures"] = [{"psnr": pair.psnr, "ssim": pair.ssim} for pair in self.pictures]
        verdict = {"passed": self.passed, "failures": self.failures(), "ties": self.ties()}
        plain: dict[str, Any] = _plain({**verdict, "threshold": asdict(self.threshold), **data})
        return plain

    def _is_tie(self, choice: Choice) -> bool:
        return self.threshold.tie is not None and choice.gap <= self.threshold.tie

    def _step_failures(self, step: StepComparison) -> Iterator[str]:
        limits, where = self.threshold, f"step {step.index} ({step.phase})"
        for name, error in step.errors.items():
            relative, limit = {
                "ema_state": (True, limits.average),
                "delta": (True, limits.delta),
            }.get(name, (limits.relative, limits.velocity))
            got = error.relative if relative else error.max_abs
            if limit is not None and not got <= limit:  # written so that NaN fails
                kind = "of the largest value" if relative else "at most"
                yield f"{where}: {name} differs by {got:.1e} {kind}, {self.precision} allows {limit:.1e}"
        for image, choice in enumerate(step.choices):
            if limits.tie is not None and not choice.agree and not self._is_tie(choice):
                yield (
                    f"{where}: image {image} would next perturb block {choice.engine}, the reference block "
                    f"{choice.reference}, whose Delta leads by {choice.gap:.1e} relative"
                )

    def _free_failures(self) -> Iterator[str]:
        """Only up to the first differing choice: from there on both may be right, on different paths."""
        limit = self.threshold.free
        if limit is None:
            return
        for position, step in enumerate(self.free):
            where = f"free run, step {step.index}"
            if not step.agree:
                before = self.steps[position - 1].choices if position else ()
                for image, choice in enumerate(before):
                    wanted, got = step.reference_blocks[image], step.engine_blocks[image]
                    # Latents that differ by up to the limit move Delta by about as much.
                    if wanted != got and choice.gap > limit:
                        yield (
                            f"{where}: image {image} perturbs {list(got)}, the reference {list(wanted)}, "
                            f"whose Delta led by {choice.gap:.1e} relative; is the state handed on unchanged?"
                        )
                return
            if not step.max_abs <= limit:
                yield (
                    f"{where}: latents differ by {step.max_abs:.1e} although every choice agreed, "
                    f"{self.precision} allows {limit:.1e}; is the state handed on unchanged?"
                )


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
