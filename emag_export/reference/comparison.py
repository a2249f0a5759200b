"""What a comparison found, and where it is more than is allowed. Plain data only."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from jaxtyping import UInt8

from emag_export.reference.direction import DirectionError, mean_of
from emag_export.reference.thresholds import FLOOR_FACTOR, THRESHOLDS, VELOCITIES, Threshold
from emag_export.runtime.sampling.plan import Phase

__all__ = [
    "Choice",
    "Comparison",
    "FloorRatio",
    "FreeStep",
    "PicturePair",
    "StepComparison",
    "TensorError",
]


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
    floor: Mapping[str, TensorError] = field(default_factory=dict)
    """By output, PyTorch's own errors in the engine's precision; empty where they were not measured."""
    direction: DirectionError | None = None
    """What became of c - p; None where the step does not guide."""
    direction_floors: Mapping[str, DirectionError] = field(default_factory=dict)
    """By precision, what PyTorch makes of it; empty where that was not measured."""
    reference_delta: tuple[tuple[float, ...], ...]
    """Per image and candidate block."""
    engine_delta: tuple[tuple[float, ...], ...]
    choices: tuple[Choice, ...]
    """Per image; empty in a plain step, which measures no Delta."""


USUAL_LATENT = 5.0
"""The largest of a picture's thousands of latents, in noise and behind trained models. Larger ones round
more: an untrained model that predicts epsilon makes them a hundred times as large, as x0 divides by the root
of alpha."""


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
    size: float = 1.0
    """Largest latent of the reference after the step, in multiples of :data:`USUAL_LATENT`; at least 1."""

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
class FloorRatio:
    """The velocities of an engine beside PyTorch's in the same precision: each side's worst.

    Not compared step by step or row by row, because in a single one either side can be lucky.
    """

    engine: float
    """Largest relative error of a velocity over the steps."""
    floor: float

    @property
    def ratio(self) -> float:
        """Below 1, the engine is closer to float32 than PyTorch is."""
        return self.engine / self.floor if self.floor else math.inf if self.engine else 0.0

    @property
    def passed(self) -> bool:
        """Whether the engine is no worse than the precision explains."""
        return self.ratio <= FLOOR_FACTOR  # NaN fails


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """An engine against the reference."""

    settings: Mapping[str, str]
    """What was run, for people."""
    precision: str
    """Of the engine, as its thresholds are called."""
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
            *self._floor_failures(),
            *self._direction_failures(),
            *self._free_failures(),
        ]

    @property
    def direction(self) -> DirectionError | None:
        """What becomes of c - p, means over guided steps; None where none guides."""
        found = [step.direction for step in self.steps if step.direction is not None]
        return mean_of(found) if found else None

    @property
    def direction_floors(self) -> Mapping[str, DirectionError]:
        """Likewise of PyTorch, by precision."""
        precisions = dict.fromkeys(name for step in self.steps for name in step.direction_floors)
        return {
            name: mean_of(step.direction_floors[name] for step in self.steps if name in step.direction_floors)
            for name in precisions
        }

    @property
    def agreeing(self) -> float | None:
        """Share of block choices that agree; None where no block is chosen by an average."""
        agree = [choice.agree for step in self.steps for choice in step.choices]
        return sum(agree) / len(agree) if agree else None

    @property
    def floor(self) -> FloorRatio | None:
        """The engine's velocities beside PyTorch's; None where those were not measured."""
        if not any(step.floor for step in self.steps):
            return None
        return FloorRatio(
            engine=_worst(step.errors for step in self.steps), floor=_worst(step.floor for step in self.steps)
        )

    @property
    def agreement(self) -> str:
        """How many choices of a block agree, in words."""
        agree = [choice.agree for step in self.steps for choice in step.choices]
        if not agree:
            return "no block is chosen by an average"
        return f"{sum(agree)} of {len(agree)} block choices agree"

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
        floor = None if self.floor is None else {**asdict(self.floor), "ratio": self.floor.ratio}
        direction = None if self.direction is None else asdict(self.direction)
        floors = {name: asdict(found) for name, found in self.direction_floors.items()}
        means = {"floor": floor, "direction": direction, "direction_floors": floors}
        plain: dict[str, Any] = _plain({**verdict, "threshold": asdict(self.threshold), **means, **data})
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

    def _floor_failures(self) -> Iterator[str]:
        floor = self.floor
        if floor is not None and self.threshold.direction is None and not floor.passed:
            yield (
                f"velocities differ by up to {floor.engine:.1e} of the largest value, {floor.ratio:.2f} "
                f"times what PyTorch loses in {self.precision}; {FLOOR_FACTOR:g} times is allowed"
            )

    def _direction_failures(self) -> Iterator[str]:
        """Of quantised engines: how much of the guidance is left."""
        limits, got = self.threshold.direction, self.direction
        if limits is None or got is None:
            return
        judged = [
            ("the norm of the error of c, as a fraction of that of c,", got.cond, 0.0, limits.cond),
            ("the norm of the error of c - p, as a fraction of that of c - p,", got.error, 0.0, limits.error),
            ("c - p projected on the reference's", got.projection, *limits.projection),
        ]
        if self.agreeing is not None:
            judged.append(("the share of block choices that agree", self.agreeing, limits.choices, 1.0))
        for what, value, least, most in judged:
            if not least <= value <= most:  # NaN fails
                yield f"{what} is {value:.3g} in the mean; {self.precision} allows {least:g} to {most:g}"

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
            if not step.max_abs <= limit * step.size:
                yield (
                    f"{where}: latents differ by {step.max_abs:.1e} although every choice agreed, "
                    f"{self.precision} allows {limit * step.size:.1e}; is the state handed on unchanged?"
                )


def _worst(steps: Iterable[Mapping[str, TensorError]]) -> float:
    """The largest relative error of a velocity; NaN is larger than anything."""
    errors = [errors[name].relative for errors in steps for name in VELOCITIES if name in errors]
    return max(errors, key=lambda error: (math.isnan(error), error))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
