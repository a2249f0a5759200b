"""Tune the scales of every method on prompts of their own, from grids of the same size."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from emag_export.evaluation.methods import method_named
from emag_export.evaluation.metrics.protocol import Column
from emag_export.evaluation.scoring import PictureScores
from emag_export.evaluation.settings import Setting

__all__ = ["GRID", "candidates", "choose", "sweep_record"]

_SINGLE = (0.3, 0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 1.9, 2.4)
"""Factors of the strength of a method with one scale."""
_EACH = (0.5, 1.0, 1.5)
"""Of each of two scales."""
GRID = len(_SINGLE)
"""Settings that are tried of every method that has a scale: as many of one as of another."""


def candidates(setting: Setting) -> list[Setting]:
    """What is tried instead of a setting; the setting itself is among it.

    A strength is the distance of a scale to 1, at which it does nothing: the grid of a method lies around
    the model's own scales, whichever they are.

    Args:
        setting: At the model's own scales.
    """
    method = method_named(setting.method)
    if method.scaled and method.perturbed:
        return [
            replace(setting, scale=_at(setting.scale, w), emag_scale=_at(setting.emag_scale, s))
            for w in _EACH
            for s in _EACH
        ]
    if method.scaled:
        return [replace(setting, scale=_at(setting.scale, factor)) for factor in _SINGLE]
    if method.perturbed:
        return [replace(setting, emag_scale=_at(setting.emag_scale, factor)) for factor in _SINGLE]
    return [setting]


def _at(scale: float | None, factor: float) -> float:
    assert scale is not None
    return round(1 + (scale - 1) * factor, 4)


def choose(
    groups: Sequence[Sequence[Setting]], pictures: Sequence[PictureScores], column: Column
) -> list[Setting]:
    """The best of each group; of equals the first.

    Args:
        groups: Candidates of each method and variant.
        pictures: Scores of the prompts to tune on.
        column: What is best.
    """
    means = _means(pictures, column)
    sign = 1 if column.better == "higher" else -1
    return [max(group, key=lambda setting: sign * means[setting.label]) for group in groups]


def sweep_record(
    groups: Sequence[Sequence[Setting]],
    pictures: Sequence[PictureScores],
    column: Column,
    prompts: Sequence[str],
) -> Mapping[str, Any]:
    """What was tried, for the report."""
    means, chosen = _means(pictures, column), choose(groups, pictures, column)
    return {
        "column": column.name,
        "prompts": list(prompts),
        "methods": [
            {
                "series": best.series,
                "chosen": best.label,
                "tried": {setting.label: _finite(means[setting.label]) for setting in group},
            }
            for group, best in zip(groups, chosen, strict=True)
        ],
    }


def _means(pictures: Sequence[PictureScores], column: Column) -> dict[str, float]:
    """Mean over prompts; what could be measured nowhere is worse than all else."""
    values: dict[str, list[float]] = {}
    for row in pictures:
        value = row.mean(column.name)
        values.setdefault(row.setting, []).extend([] if value is None else [value])
    worst = -np.inf if column.better == "higher" else np.inf
    return {label: float(np.mean(found)) if found else worst for label, found in values.items()}


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
