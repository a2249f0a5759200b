"""Frechet and kernel distance of two sets of features; numpy only."""

import numpy as np

from emag_export.evaluation.metrics.protocol import Features

__all__ = ["fid", "kid"]

_DEGREE = 3


def fid(pictures: Features, references: Features) -> float | None:
    """Frechet distance of two normal distributions with the sets' means and covariances; 0 for the same set.

    It is too large by an amount that falls with the number of pictures: compare sets of one size.

    Args:
        pictures: Generated.
        references: Real.

    Returns:
        The distance, in squared units of the features; None where there are fewer pictures than features,
            whose covariance says nothing.

    Source:
        arXiv:1706.08500, eq. 6.
    """
    if min(len(pictures), len(references)) <= pictures.shape[1]:
        return None
    ours, theirs = pictures.astype(np.float64), references.astype(np.float64)
    apart = ((ours.mean(0) - theirs.mean(0)) ** 2).sum()
    one, two = np.cov(ours, rowvar=False), np.cov(theirs, rowvar=False)
    # Of a product of covariances the eigenvalues are real and not negative; rounding makes them a little so.
    roots = np.sqrt(np.maximum(np.linalg.eigvals(one @ two).real, 0))
    return float(max(apart + np.trace(one) + np.trace(two) - 2 * roots.sum(), 0))


def kid(pictures: Features, references: Features) -> float:
    """Unbiased squared maximum mean discrepancy under a cubic kernel; may be a little below 0.

    Args:
        pictures: Generated, at least two.
        references: Real, at least two.

    Source:
        arXiv:1801.01401, section 4, of all pairs instead of random subsets.
    """
    ours, theirs = pictures.astype(np.float64), references.astype(np.float64)

    def kernel(one: np.ndarray, two: np.ndarray) -> np.ndarray:
        return np.asarray((one @ two.T / one.shape[1] + 1) ** _DEGREE)

    def within(one: np.ndarray) -> float:
        found = kernel(one, one)
        return float((found.sum() - np.trace(found)) / (len(one) * (len(one) - 1)))

    return within(ours) + within(theirs) - 2 * float(kernel(ours, theirs).mean())
