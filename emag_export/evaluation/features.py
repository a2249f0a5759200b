"""Embeddings of pictures, each computed once, and the sets of a report against reference pictures."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from emag_export.errors import InputError
from emag_export.evaluation.metrics.clip import ClipScore
from emag_export.evaluation.metrics.distribution import set_scores
from emag_export.evaluation.metrics.protocol import Scores
from emag_export.evaluation.scoring import PictureScores, read_pixels, rounded
from emag_export.hashing import hash_file

__all__ = ["FeatureStore", "reference_pictures", "score_sets"]

_PICTURES = (".png", ".jpg", ".jpeg", ".webp")


class FeatureStore:
    """Embeddings on disk, a file a picture, by its hash.

    Args:
        folder: Where they are kept, below the name of the model.
        clip: Makes them.
    """

    def __init__(self, folder: Path, clip: ClipScore) -> None:
        self._folder, self._clip = folder / f"features-{clip.key()}", clip

    def get(self, picture: Path) -> Float[np.ndarray, " features"]:
        """The embedding of a picture."""
        path = self._folder / f"{hash_file(picture)}.npy"
        if not path.exists():
            self._folder.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.partial")
            with partial.open("wb") as file:
                np.save(file, self._clip.features(read_pixels(picture)))
            partial.replace(path)
        found: np.ndarray = np.load(path)
        return found


def reference_pictures(folder: Path) -> list[Path]:
    """Pictures of a folder and those below it, by name.

    Raises:
        InputError: If there is none.
    """
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _PICTURES)
    if not found:
        raise InputError(f"`reference` {folder} holds no {', '.join(_PICTURES)}; give a folder of pictures")
    return found


def score_sets(
    pictures: Sequence[PictureScores],
    references: Sequence[Path],
    store: FeatureStore,
    tell: Callable[[], None] = lambda: None,
) -> dict[str, Scores]:
    """All pictures of each setting against the reference pictures.

    Args:
        pictures: One per setting and prompt.
        references: Of :func:`reference_pictures`.
        store: Of embeddings.
        tell: Told after every picture.

    Returns:
        Label of the setting to its scores.
    """

    def embedded(paths: Sequence[Path]) -> np.ndarray:
        rows = []
        for path in paths:
            rows.append(store.get(path))
            tell()
        return np.stack(rows)

    theirs = embedded(references)
    paths: dict[str, list[Path]] = {}
    for row in pictures:
        paths.setdefault(row.setting, []).extend(row.paths)
    scores = {label: set_scores(embedded(found), theirs) for label, found in paths.items()}
    return {label: {name: rounded(value) for name, value in row.items()} for label, row in scores.items()}
