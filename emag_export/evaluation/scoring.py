"""Scores of all pictures, each measured once: they are kept beside the pictures, by the hash of the file."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from emag_export.evaluation.metrics.protocol import Metric, Scores, SeedMetric
from emag_export.evaluation.pixels import read_pixels
from emag_export.evaluation.trials import Trials
from emag_export.hashing import hash_file

__all__ = ["PictureScores", "ScoreStore", "rounded", "score_trials"]

_DIGITS = 9
"""Significant ones that are kept: more than any metric means, fewer than differ between processors."""


@dataclass(frozen=True, kw_only=True)
class PictureScores:
    """The pictures of one prompt at one setting, and what was measured of them."""

    setting: str
    """Its label."""
    prompt: int
    """Its number."""
    paths: tuple[Path, ...]
    """One per seed."""
    scores: tuple[Scores, ...]
    """One per seed."""
    together: Scores
    """Of all seeds."""

    def mean(self, column: str) -> float | None:
        """Over seeds, those that could not be measured left out; None if none could."""
        if column in self.together:
            return self.together[column]
        found = [value for row in self.scores if (value := row.get(column)) is not None]
        return float(np.mean(found)) if found else None


class ScoreStore:
    """Scores of one metric on disk, a line a picture, appended as they are found.

    Args:
        path: The file; a line that a killed run or a full disk left in pieces is measured again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, Scores] = {}
        if path.exists():
            whole, _, rest = path.read_bytes().rpartition(b"\n")
            for line in whole.splitlines():
                record = _record(line)
                if record is not None:
                    self._known[record["sha256"]] = record["scores"]
            if rest:
                path.write_bytes(whole + b"\n" if whole else b"")

    def get(self, sha256: str, measure: Callable[[], Scores]) -> Scores:
        """What is known of a picture, measured now if nothing is."""
        if sha256 not in self._known:
            scores = {name: rounded(value) for name, value in measure().items()}
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"sha256": sha256, "scores": scores}) + "\n")
            self._known[sha256] = scores
        return self._known[sha256]


def _record(line: bytes) -> dict[str, Any] | None:
    """A line of a store; None if it is damaged."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(found, dict) and isinstance(found.get("sha256"), str)
    return found if whole and isinstance(found.get("scores"), dict) else None


def rounded(value: float | None) -> float | None:
    """To the digits that are kept."""
    return None if value is None else float(f"{value:.{_DIGITS}g}")


def score_trials(
    trials: Iterable[Trials],
    metrics: Sequence[Metric],
    together: Sequence[SeedMetric],
    folder: Path,
    tell: Callable[[], None] = lambda: None,
) -> list[PictureScores]:
    """Measure every picture.

    Args:
        trials: All pictures are there.
        metrics: Of single pictures.
        together: Of the pictures of a prompt.
        folder: Where scores are kept.
        tell: Told after every picture.

    Returns:
        One per setting and prompt, in the order of the trials.
    """
    stores = {metric.name: ScoreStore(folder / f"{metric.key()}.jsonl") for metric in metrics}
    found = []
    for trial in trials:
        for setting in trial.settings:
            for number, prompt in enumerate(trial.prompts):
                paths = tuple(trial.output / item.path for item in trial.items_of(setting, number))
                scores = []
                for path in paths:
                    scores.append(_score(path, prompt, metrics, stores))
                    tell()
                found.append(
                    PictureScores(
                        setting=setting.label,
                        prompt=number,
                        paths=paths,
                        scores=tuple(scores),
                        together=_together(paths, together),
                    )
                )
    return found


def _score(path: Path, prompt: str, metrics: Sequence[Metric], stores: Mapping[str, ScoreStore]) -> Scores:
    sha256 = hash_file(path)
    values: dict[str, float | None] = {}
    for metric in metrics:
        measured = stores[metric.name].get(sha256, lambda m=metric: m.score(prompt, read_pixels(path)))  # type: ignore[misc]
        values |= measured
    return values


def _together(paths: Sequence[Path], metrics: Sequence[SeedMetric]) -> Scores:
    values: dict[str, float | None] = {}
    if metrics:
        pictures = [read_pixels(path) for path in paths]
        for metric in metrics:
            values |= {name: rounded(value) for name, value in metric.score(pictures).items()}
    return values
