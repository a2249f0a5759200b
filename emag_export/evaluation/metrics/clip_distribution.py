"""All pictures of a setting against a folder of real ones, by embeddings of a CLIP model."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Float

from emag_export.errors import InputError
from emag_export.evaluation.metrics.clip import ClipScore
from emag_export.evaluation.metrics.distribution import CLIP_COLUMNS, COLUMNS, cmmd, set_scores
from emag_export.evaluation.metrics.protocol import Features, Pixels, Scores
from emag_export.evaluation.pixels import read_pixels

__all__ = ["ClipDistribution", "reference_pictures"]

_PICTURES = (".png", ".jpg", ".jpeg", ".webp")


class ClipDistribution:
    """Distances of sets in the space of a CLIP model.

    Args:
        clip: Embeds pictures.
        folder: Of reference pictures.
    """

    name = "distribution"
    columns = (*CLIP_COLUMNS, *COLUMNS)
    kept = True

    def __init__(self, clip: ClipScore, folder: Path) -> None:
        self._clip, self._folder = clip, folder

    def key(self) -> str:
        """That of the CLIP model."""
        return self._clip.key()

    def features(self, pixels: Pixels) -> Float[np.ndarray, " features"]:
        """The picture's embedding."""
        return self._clip.features(pixels)

    def references(self) -> Iterator[Pixels]:
        """The pictures of the folder, by name."""
        return map(read_pixels, reference_pictures(self._folder))

    def score(self, pictures: Features, references: Features) -> Scores:
        """Numbers of a setting, one per column."""
        return {"cmmd": cmmd(pictures, references), **set_scores(pictures, references)}


def reference_pictures(folder: Path) -> list[Path]:
    """Pictures of a folder and those below it, by name.

    Raises:
        InputError: If there is none.
    """
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _PICTURES)
    if not found:
        raise InputError(f"`reference` {folder} holds no {', '.join(_PICTURES)}; give a folder of pictures")
    return found
