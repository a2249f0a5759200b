"""Intervals and tests over prompts. Seeds of a prompt are averaged first: prompts are what is independent."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

__all__ = ["LEVEL", "Interval", "bootstrap_interval", "holm", "sign_flip_p"]

LEVEL = 0.95
_RESAMPLES = 10_000
_FLIPS = 20_000
_EXACT = 14
"""Up to so many prompts, all signs are gone through: 16384 of them."""
_SEED = 20251217
_ROUNDING = 1e-12
"""Relative; sums of the same numbers in another order are equal up to this."""

Values = Float[np.ndarray, " prompts"]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean over prompts and where it may lie."""

    mean: float
    low: float
    high: float


def bootstrap_interval(values: Sequence[float] | Values, level: float = LEVEL) -> Interval:
    """Percentile bootstrap interval of a mean; the same values give the same interval.

    With few prompts it is too narrow: at 10 of them from a normal distribution, 95 % cover 90 %.

    Args:
        values: One per prompt, at least one.
        level: Coverage.
    """
    found = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(_SEED)
    means = np.concatenate(
        [
            found[rng.integers(0, len(found), (_RESAMPLES // 10, len(found)))].mean(axis=1)
            for _ in range(10)  # a tenth at a time, so that thousands of prompts fit in memory
        ]
    )
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean=float(found.mean()), low=float(low), high=float(high))


def sign_flip_p(differences: Sequence[float] | Values) -> float:
    """Two-sided p of a paired permutation test: are two settings the same, prompt by prompt?

    If they are, each difference could as well have the other sign. p is the share of all signs under which
    the mean is at least as far from 0; of 20000 random ones where there are more than 14 prompts.

    Args:
        differences: One per prompt.
    """
    found = np.asarray(differences, dtype=np.float64)
    found = found[found != 0]
    if not len(found):
        return 1.0
    observed = abs(found.sum()) * (1 - _ROUNDING)
    if len(found) <= _EXACT:
        numbers = np.arange(1 << len(found))[:, None]
        signs = 1 - 2 * ((numbers >> np.arange(len(found))) & 1)
        return float((np.abs(signs @ found) >= observed).mean())
    rng = np.random.default_rng(_SEED)
    reached = sum(
        int((np.abs(rng.choice([-1.0, 1.0], (_FLIPS // 10, len(found))) @ found) >= observed).sum())
        for _ in range(10)
    )
    return (1 + reached) / (1 + _FLIPS)  # the observed signs are one of them


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p values for their number, so that one in twenty reports has any false finding at 0.05.

    Args:
        p_values: Of all tests that were made.

    Returns:
        Adjusted ones in the same order.

    Source:
        S. Holm, A simple sequentially rejective multiple test procedure, 1979.
    """
    order = np.argsort(p_values, kind="stable")
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted
