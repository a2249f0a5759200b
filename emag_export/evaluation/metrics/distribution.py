"""All pictures of a setting against reference pictures, in a space of features; numpy only."""

import numpy as np

from emag_export.errors import InputError
from emag_export.evaluation.metrics.moments import fid, kid
from emag_export.evaluation.metrics.protocol import Column, Features, Scores

__all__ = ["CLIP_COLUMNS", "COLUMNS", "cmmd", "neighbourhoods", "set_scores"]

_SIGMA = 10.0
_SCALE = 1000.0
"""Both as published: distances of unit vectors are small."""
_NEIGHBOURS = 5

CLIP_COLUMNS = (
    Column(
        name="cmmd",
        better="lower",
        tested=False,
        summary="distance of the two sets: squared MMD of CLIP embeddings, times 1000",
    ),
)
"""What is defined for embeddings of a CLIP model only."""

COLUMNS = (
    Column(
        name="fid",
        better="lower",
        tested=False,
        summary="Frechet distance of the two sets, if there are more pictures than features",
    ),
    Column(
        name="kid",
        better="lower",
        tested=False,
        summary="kernel distance of the two sets, which does not depend on their size",
    ),
    Column(
        name="precision",
        better="higher",
        tested=False,
        summary="share of pictures inside the neighbourhood of some reference",
    ),
    Column(
        name="recall",
        better="higher",
        tested=False,
        summary="share of references inside the neighbourhood of some picture",
    ),
    Column(
        name="density",
        better="higher",
        tested=False,
        summary="how many neighbourhoods of references a picture lies in, over their size",
    ),
    Column(
        name="coverage",
        better="higher",
        tested=False,
        summary="share of references with a picture in their neighbourhood",
    ),
)


def set_scores(pictures: Features, references: Features) -> Scores:
    """A number per column of :data:`COLUMNS`.

    Args:
        pictures: Features of one setting's pictures.
        references: Of the reference pictures.

    Raises:
        InputError: If either has too few pictures for its neighbourhoods.
    """
    if min(len(pictures), len(references)) <= _NEIGHBOURS:
        raise InputError(
            f"{len(pictures)} pictures of a setting and {len(references)} in `reference`; "
            f"neighbourhoods of {_NEIGHBOURS} need more than {_NEIGHBOURS} of each"
        )
    distances = {"fid": fid(pictures, references), "kid": kid(pictures, references)}
    return {**distances, **neighbourhoods(pictures, references, _NEIGHBOURS)}


def cmmd(pictures: Features, references: Features) -> float:
    """Squared maximum mean discrepancy of unit vectors under a Gaussian kernel; 0 for the same set.

    Source:
        arXiv:2401.09603, section 4, with the released code's sigma of 10 and factor of 1000.
    """
    ours, theirs = _unit(pictures), _unit(references)

    def mean(one: Features, two: Features) -> float:
        return float(np.exp(-_squared(one, two) / (2 * _SIGMA**2)).mean())

    return _SCALE * (mean(ours, ours) + mean(theirs, theirs) - 2 * mean(ours, theirs))


def neighbourhoods(pictures: Features, references: Features, neighbours: int) -> dict[str, float]:
    """Precision, recall, density and coverage.

    Args:
        pictures: Generated.
        references: Real.
        neighbours: k; a neighbourhood is the ball to the k-th nearest of its own set.

    Source:
        arXiv:1904.06991, eq. 1 to 3, and arXiv:2002.09797, section 3.
    """
    across = _squared(references, pictures)
    of_references = _radius(references, neighbours)[:, None]
    of_pictures = _radius(pictures, neighbours)[None, :]
    inside = across < of_references
    return {
        "precision": float(inside.any(axis=0).mean()),
        "recall": float((across < of_pictures).any(axis=1).mean()),
        "density": float(inside.sum(axis=0).mean() / neighbours),
        "coverage": float((across.min(axis=1) < of_references[:, 0]).mean()),
    }


def _radius(features: Features, neighbours: int) -> np.ndarray:
    """Squared distance of each to its k-th nearest other."""
    return np.asarray(np.partition(_squared(features, features), neighbours, axis=1)[:, neighbours])


def _squared(one: Features, two: Features) -> np.ndarray:
    """Squared distances of all pairs."""
    first, second = one.astype(np.float64), two.astype(np.float64)
    squares = (first**2).sum(1)[:, None] + (second**2).sum(1)[None, :] - 2 * first @ second.T
    return np.asarray(np.maximum(squares, 0))


def _unit(features: Features) -> Features:
    return np.asarray(features / np.linalg.norm(features, axis=1, keepdims=True))
