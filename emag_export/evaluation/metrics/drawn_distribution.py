"""All pictures of a setting against drawings of the same prompts, by features of the extractor."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from emag_export.evaluation.metrics.distribution import COLUMNS, set_scores
from emag_export.evaluation.metrics.moments import fid
from emag_export.evaluation.metrics.protocol import Features, Pixels, Scores
from emag_export.evaluation.truth import Truth, drawing_of
from emag_export.hashing import hash_file

if TYPE_CHECKING:
    from emag_export.evaluation.extractor.network import Extractor

__all__ = ["DrawnDistribution"]

_DRAWINGS = 1000
"""References at least; every prompt has as many as another."""
_SEED = 7
_LEADING = 24
"""Axes that FID takes."""


class DrawnDistribution:
    """Distances of sets in the space of the extractor, which knows the small models' pictures.

    Args:
        truth: Reads prompts.
        prompts: What is drawn for comparison, at places and sizes that the words allow.
    """

    name = "drawn-distribution"
    columns = COLUMNS
    kept = False

    def __init__(self, truth: Truth, prompts: Sequence[str]) -> None:
        self._truth, self._prompts = truth, tuple(prompts)

    @cached_property
    def _extractor(self) -> "Extractor":
        from emag_export.evaluation.extractor.network import load_extractor

        return load_extractor()

    def key(self) -> str:
        """Changes with the extractor's weights."""
        from emag_export.evaluation.extractor.network import WEIGHTS

        return f"{self.name}-{hash_file(WEIGHTS)[:12]}"

    def features(self, pixels: Pixels) -> Float[np.ndarray, " features"]:
        """What the extractor sees."""
        import torch

        from emag_export.tiny_sd3.checker import to_canvas

        image = torch.from_numpy(to_canvas(pixels)).permute(2, 0, 1)[None] * 2 - 1
        made: np.ndarray = self._extractor(image)[0].numpy()
        return made

    def references(self) -> Iterator[Pixels]:
        """Drawings of the prompts, the same every time."""
        rng = np.random.default_rng(_SEED)
        for _ in range(-(-_DRAWINGS // len(self._prompts))):
            for prompt in self._prompts:
                drawing = drawing_of(self._truth, prompt, rng)
                if drawing is not None:
                    yield drawing

    def score(self, pictures: Features, references: Features) -> Scores:
        """Numbers of a setting, one per column, along the principal axes of the references.

        Every axis has unit variance, so that the few that hold colours and places do not drown those that
        hold outlines. FID is of the leading ones, which hold 99 % of the variance: it needs more pictures
        than axes.
        """
        centre = references.mean(0)
        _, spread, axes = np.linalg.svd(references - centre, full_matrices=False)
        whiten = axes.T * (np.sqrt(len(references)) / spread)
        ours, theirs = ((rows - centre) @ whiten for rows in (pictures, references))
        return {**set_scores(ours, theirs), "fid": fid(ours[:, :_LEADING], theirs[:, :_LEADING])}
