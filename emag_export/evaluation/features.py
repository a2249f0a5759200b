"""Features of pictures, each computed once, and the sets of a report against reference pictures."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from emag_export.evaluation.metrics.protocol import Pixels, Scores, SetMetric
from emag_export.evaluation.pixels import read_pixels
from emag_export.evaluation.scoring import PictureScores, rounded

__all__ = ["FeatureStore", "score_sets"]


class FeatureStore:
    """Features by the pixels that they are of; on disk, a file a picture, if the metric wants them kept.

    Args:
        folder: Where they are kept, below the name of the metric's model.
        metric: Makes them.
    """

    def __init__(self, folder: Path, metric: SetMetric) -> None:
        self._folder, self._metric = folder / f"features-{metric.key()}", metric

    def get(self, pixels: Pixels) -> Float[np.ndarray, " features"]:
        """The features of a picture."""
        if not self._metric.kept:
            return self._metric.features(pixels)
        name = hashlib.sha256(repr(pixels.shape).encode() + np.ascontiguousarray(pixels).tobytes())
        path = self._folder / f"{name.hexdigest()}.npy"
        if not path.exists():
            self._folder.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.partial")
            with partial.open("wb") as file:
                np.save(file, self._metric.features(pixels))
            partial.replace(path)
        found: np.ndarray = np.load(path)
        return found


def score_sets(
    pictures: Sequence[PictureScores],
    metric: SetMetric,
    folder: Path,
    tell: Callable[[], None] = lambda: None,
) -> dict[str, Scores]:
    """All pictures of each setting against the reference pictures.

    Args:
        pictures: One per setting and prompt.
        metric: Compares.
        folder: Where features are kept.
        tell: Told after every picture of a setting.

    Returns:
        Label of the setting to its scores.
    """
    store = FeatureStore(folder, metric)
    paths: dict[str, list[Path]] = {}
    for row in pictures:
        paths.setdefault(row.setting, []).extend(row.paths)

    def embedded(found: Iterable[Path]) -> np.ndarray:
        rows = []
        for path in found:
            rows.append(store.get(read_pixels(path)))
            tell()
        return np.stack(rows)

    theirs = np.stack([store.get(pixels) for pixels in metric.references()])
    scores = {label: metric.score(embedded(found), theirs) for label, found in paths.items()}
    return {label: {name: rounded(value) for name, value in row.items()} for label, row in scores.items()}
