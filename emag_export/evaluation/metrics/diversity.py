"""How much the pictures of one prompt differ between seeds."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from emag_export.evaluation.metrics.protocol import Column, Pixels, Scores

__all__ = ["Diversity"]


class Diversity:
    """Distance of pictures from each other, pixel by pixel. Strong guidance makes them alike."""

    name = "diversity"
    columns = (
        Column(
            name="diversity",
            better="neither",
            unit="levels",
            summary="RMS difference of two seeds of a prompt, mean over pairs, of 255",
        ),
    )

    def score(self, pictures: Sequence[Pixels]) -> Scores:
        """None for a single picture."""
        pairs = [
            float(np.sqrt(np.mean((first.astype(np.float64) - second) ** 2)))
            for first, second in combinations(pictures, 2)
        ]
        return {"diversity": float(np.mean(pairs)) if pairs else None}
