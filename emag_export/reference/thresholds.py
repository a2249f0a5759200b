"""Which differences from the float32 reference are allowed, and why those."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from emag_export.quantisation import Scheme

__all__ = ["FLOOR_FACTOR", "THRESHOLDS", "VELOCITIES", "DirectionLimits", "Threshold", "judged_as"]


@dataclass(frozen=True, kw_only=True)
class DirectionLimits:
    """How much of c - p a quantised engine must keep, in means over guided steps."""

    cond: float
    """Largest error of c, as a fraction of its norm."""
    error: float
    """Largest error of c - p, as a fraction of its norm."""
    projection: tuple[float, float]
    """How far it may steer along the reference's c - p, in multiples of it."""
    choices: float
    """Smallest share of block choices that agree."""


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
    """Largest difference of latents of usual size in a free run while both sides choose alike, in proportion
    where they are larger; a differing choice is excused where Delta lead by less than this fraction. None:
    not judged."""
    direction: DirectionLimits | None = None
    """Of schemes of quantisation, which are judged by it and not by PyTorch's error in half precision."""


def _quantised(velocity: float, average: float, direction: DirectionLimits) -> Threshold:
    """Of a scheme: nothing is asked of single Delta or of a free run, which parts for good."""
    return Threshold(
        velocity=velocity,
        relative=True,
        average=average,
        delta=None,
        tie=None,
        free=None,
        direction=direction,
    )


_HALF_AVERAGES = "float32 with float16 averages"

THRESHOLDS: Mapping[str, Threshold] = MappingProxyType(
    {
        "float32": Threshold(velocity=1e-4, relative=False, average=1e-4, delta=1e-4, tie=2e-5, free=1e-3),
        _HALF_AVERAGES: Threshold(
            velocity=2e-3, relative=False, average=1.1e-3, delta=1e-3, tie=1e-3, free=0.05
        ),
        "float16": Threshold(velocity=0.02, relative=True, average=0.03, delta=None, tie=None, free=None),
        "bfloat16": Threshold(velocity=0.25, relative=True, average=0.15, delta=None, tie=None, free=None),
        Scheme.W8: _quantised(
            velocity=0.05,
            average=0.05,
            direction=DirectionLimits(cond=6e-3, error=0.05, projection=(0.97, 1.03), choices=0.99),
        ),
        Scheme.FP8: _quantised(
            velocity=0.3,
            average=0.3,
            direction=DirectionLimits(cond=3.5e-2, error=0.25, projection=(0.95, 1.05), choices=0.93),
        ),
        Scheme.INT8: _quantised(
            velocity=0.15,
            average=0.15,
            direction=DirectionLimits(cond=2e-2, error=0.25, projection=(0.95, 1.05), choices=0.97),
        ),
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

float32 with float16 averages: E is rounded when the reference's is fed and when the new one leaves the graph,
each time by 2^-11 of a value; twice that and float32's own 1e-4 are allowed. No other number is rounded, and
the roundings of many elements average out behind it. Measured for four variants of two models of 10 blocks,
8 and 28 steps: velocities differ by at most 3e-4, and only those that use an average; Delta by 2e-4 of its
own, so that a tie is wider than twice that; every choice agreed. Free runs, in which what is lost stays lost,
ended up to 9e-3 away. Weights in half precision round more than averages do, and have their own row.

w8, fp8 and int8 are judged by what is left of c - p, measured for tiny-sd3 in
``benchmarks/results/quantised``, with room for other prompts. Their limits of single velocities and averages
are wide, and only find graphs that compute something else.
"""


def judged_as(weights: str, averages: str, scheme: Scheme | None = None) -> str:
    """The key in :data:`THRESHOLDS` of an engine.

    Args:
        weights: Their precision.
        averages: The precision in which they are kept.
        scheme: Of quantisation, which counts for more than either.
    """
    if scheme is not None:
        return scheme
    return _HALF_AVERAGES if (weights, averages) == ("float32", "float16") else weights


VELOCITIES = ("uncond", "cond", "perturbed")

FLOOR_FACTOR = 1.5
"""How far velocities may lie from the float32 reference, in multiples of what PyTorch itself loses in the
same precision.

That depends on the order of its roundings, which is one of many equally good ones. PyTorch with its time
embedding, or its patches, in float32 lay at 0.64 to 1.45 of it: tiny-sd3, float16, 80 comparisons of 1, 2, 4
and 28 steps. onnxruntime on a CPU, which computes float16 in float32, lay at 0.31 to 0.70. A graph that
loses more than its precision explains is seen long before the absolute threshold, which has room for any
model; that one stays for engines whose floor is not measured, and for a floor that is itself unsound.
"""
