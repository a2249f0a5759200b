"""Distances of sets of pictures, against their definitions written as loops and sets whose truth is known."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from emag_export.errors import InputError
from emag_export.evaluation.metrics.distribution import COLUMNS, cmmd, neighbourhoods, set_scores
from emag_export.evaluation.metrics.moments import fid, kid


def cloud(count: int, shift: float = 0.0, seed: int = 0, spread: float = 1.0) -> np.ndarray:
    values = np.random.default_rng(seed).normal(0, spread, (count, 6))
    values[:, 0] += shift
    return values


def test_neighbourhoods_are_their_definitions() -> None:
    pictures, references, k = cloud(30, 0.8, 1), cloud(40, 0.0, 2), 3

    def apart(one: np.ndarray, two: np.ndarray) -> float:
        return float(np.linalg.norm(one - two))

    def radius(of: np.ndarray, among: np.ndarray) -> float:
        return sorted(apart(of, other) for other in among)[k]  # the 0th is itself

    balls = [(reference, radius(reference, references)) for reference in references]
    own = [(picture, radius(picture, pictures)) for picture in pictures]
    counts = [sum(apart(picture, centre) < r for centre, r in balls) for picture in pictures]
    wanted = {
        "precision": np.mean([count > 0 for count in counts]),
        "density": np.mean(counts) / k,
        "recall": np.mean([any(apart(centre, ref) < r for centre, r in own) for ref in references]),
        "coverage": np.mean([any(apart(p, centre) < r for p in pictures) for centre, r in balls]),
    }
    assert neighbourhoods(pictures, references, k) == {
        name: pytest.approx(value) for name, value in wanted.items()
    }


def test_cmmd_is_its_definition_and_grows_with_distance() -> None:
    one, two = cloud(20, 1.0, 1), cloud(25, 0.0, 2)
    a, b = (values / np.linalg.norm(values, axis=1, keepdims=True) for values in (one, two))

    def mean(first: np.ndarray, second: np.ndarray) -> float:
        return float(np.mean([np.exp(-((x - y) ** 2).sum() / 200) for x in first for y in second]))

    assert cmmd(one, two) == pytest.approx(1000 * (mean(a, a) + mean(b, b) - 2 * mean(a, b)))
    assert cmmd(two, two) == pytest.approx(0, abs=1e-9)
    found = [cmmd(cloud(400, shift, 1), cloud(400, 0.0, 2)) for shift in (0.0, 0.5, 1.0, 2.0)]
    assert found == sorted(found) and found[1] > 3 * found[0]


class Itself(nn.Module):
    """In the place of a network: its features are what it is given."""

    num_features = 6

    def forward(self, rows: Tensor) -> Tensor:
        """The same."""
        return rows


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save all extracted features")
def test_frechet_and_kernel_distance_are_those_of_torchmetrics() -> None:
    pictures, references = cloud(50, 0.7, 1, spread=0.8), cloud(50, 0.0, 2)
    frechet = FrechetInceptionDistance(feature=Itself(), input_img_size=(1, 1, 6))
    frechet.set_dtype(torch.float64)
    kernel = KernelInceptionDistance(feature=Itself(), subsets=1, subset_size=50)
    for rows, real in ((pictures, False), (references, True)):
        frechet.update(torch.from_numpy(rows), real=real)
        kernel.update(torch.from_numpy(rows), real=real)
    assert fid(pictures, references) == pytest.approx(float(frechet.compute()), rel=1e-6)
    assert kid(pictures, references) == pytest.approx(float(kernel.compute()[0]), rel=1e-5)
    assert fid(pictures, pictures) == pytest.approx(0, abs=1e-9)
    assert fid(cloud(6), references) is None, "a covariance of as few pictures as features says nothing"
    assert abs(kid(cloud(400, seed=1), cloud(400, seed=2))) < 0.02, "unbiased"


def test_fidelity_and_diversity_are_told_apart() -> None:
    references = cloud(300)
    same, narrow, far = cloud(300, seed=1), cloud(300, seed=1, spread=0.2), cloud(300, 9.0, seed=1)
    full, few, off = (set_scores(pictures, references) for pictures in (same, narrow, far))
    assert list(full) == [column.name for column in COLUMNS]
    # Expected at equal distributions: density 1, coverage 1 - (1 - 1/2)^5 and up; both within 0.1 here.
    assert full["density"] == pytest.approx(1, abs=0.15) and (full["coverage"] or 0) > 0.9
    assert (few["precision"] or 0) > 0.98 and (few["recall"] or 0) < 0.3, "good but all alike"
    assert off["precision"] == off["coverage"] == 0, "nothing right"


def test_too_few_pictures_are_refused() -> None:
    with pytest.raises(InputError, match="5 pictures of a setting and 40 in `reference`"):
        set_scores(cloud(5), cloud(40))
