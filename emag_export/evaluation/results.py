"""What an evaluation found, as plain data: means with intervals, and paired tests against a baseline."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from emag_export.evaluation.metrics.protocol import Column, Scores
from emag_export.evaluation.probe import Contrast
from emag_export.evaluation.scoring import PictureScores
from emag_export.evaluation.settings import Setting
from emag_export.evaluation.statistics import Interval, bootstrap_interval, holm, sign_flip_p

__all__ = ["Results", "SettingResult", "Test", "summarise"]

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class SettingResult:
    """One setting."""

    setting: Setting
    cost: float
    """Row-blocks over those of classifier-free guidance."""
    values: Mapping[str, tuple[float | None, ...]]
    """Column to a value per prompt, the mean of its seeds."""
    intervals: Mapping[str, Interval]
    """Column to mean and interval; columns that could be measured nowhere are absent."""
    sets: Scores = field(default_factory=dict)
    """Of all its pictures against reference pictures, if that was asked for."""


@dataclass(frozen=True, kw_only=True)
class Test:
    """A paired test of a setting against its baseline."""

    __test__ = False  # pytest would collect it

    setting: str
    baseline: str
    column: str
    difference: Interval
    """Setting less baseline."""
    prompts: int
    """At which both have a value."""
    p: float
    p_holm: float
    """Corrected for all tests of the report."""
    verdict: str
    """``better``, ``worse``, or ``different`` where neither direction is better; ``unclear`` if p_holm is
    0.05 or more, which does not say that they are the same."""


@dataclass(frozen=True, kw_only=True)
class Results:
    """Everything that is reported; nothing in it depends on when or how often the work was interrupted."""

    facts: Mapping[str, Any]
    """Model, engine, steps, seeds: for people."""
    prompts: tuple[str, ...]
    columns: tuple[Column, ...]
    quality: str
    """The column that is plotted against cost."""
    set_columns: tuple[Column, ...] = ()
    """Of all pictures of a setting together."""
    settings: tuple[SettingResult, ...]
    tests: tuple[Test, ...]
    sweep: Mapping[str, Any] | None = None
    """How scales were tuned, if they were."""
    contrast: Mapping[str, Sequence[Contrast]] = field(default_factory=dict)
    """Label of a setting to where its negative lies in every step, if predictions were looked at."""
    pictures: tuple[PictureScores, ...] = field(default=(), repr=False)

    def column(self, name: str) -> Column:
        """A column by its name."""
        return next(column for column in self.columns if column.name == name)

    def to_json(self) -> dict[str, Any]:
        """Plain data; pictures are left out."""
        return {
            "format": FORMAT,
            "facts": dict(self.facts),
            "quality": self.quality,
            "prompts": list(self.prompts),
            "columns": [asdict(column) for column in self.columns],
            "set_columns": [asdict(column) for column in self.set_columns],
            "settings": [
                {
                    "label": row.setting.label,
                    **asdict(row.setting),
                    "row_blocks_relative_to_cfg": row.cost,
                    "columns": {
                        name: {**asdict(row.intervals[name]), "prompts": list(values)}
                        for name, values in row.values.items()
                        if name in row.intervals
                    },
                    "sets": dict(row.sets),
                }
                for row in self.settings
            ],
            "tests": [asdict(test) for test in self.tests],
            "sweep": self.sweep,
            "contrast": {label: [asdict(step) for step in row] for label, row in self.contrast.items()},
        }


def summarise(
    settings: Sequence[tuple[Setting, float]],
    pictures: Sequence[PictureScores],
    columns: Sequence[Column],
    *,
    baseline: str | None,
    sets: Mapping[str, Scores] | None = None,
) -> tuple[tuple[SettingResult, ...], tuple[Test, ...]]:
    """Means, intervals and tests.

    Args:
        settings: Each with its cost.
        pictures: One per setting and prompt.
        columns: Of all metrics.
        baseline: Method that the others are tested against; None makes no tests.
        sets: Label of a setting to the scores of all its pictures.
    """
    by_label: dict[str, list[PictureScores]] = {}
    for row in pictures:
        by_label.setdefault(row.setting, []).append(row)
    rows = []
    for setting, cost in settings:
        found = sorted(by_label[setting.label], key=lambda row: row.prompt)
        values = {column.name: tuple(row.mean(column.name) for row in found) for column in columns}
        rows.append(
            SettingResult(
                setting=setting,
                cost=cost,
                values=values,
                intervals=_intervals(values),
                sets=(sets or {}).get(setting.label, {}),
            )
        )
    return tuple(rows), _tests(rows, columns, baseline)


def _intervals(values: Mapping[str, Sequence[float | None]]) -> dict[str, Interval]:
    known = {name: [value for value in row if value is not None] for name, row in values.items()}
    return {name: bootstrap_interval(row) for name, row in known.items() if row}


def _tests(
    rows: Sequence[SettingResult], columns: Sequence[Column], baseline: str | None
) -> tuple[Test, ...]:
    pairs = [
        (row, partner)
        for row in rows
        if row.setting.method != baseline and (partner := _partner(row, rows, baseline)) is not None
    ]
    made = [
        (row, partner, column, differences)
        for row, partner in pairs
        for column in columns
        if column.tested and (differences := _differences(row, partner, column.name))
    ]
    p_values = [sign_flip_p(differences) for *_, differences in made]
    return tuple(
        Test(
            setting=row.setting.label,
            baseline=partner.setting.label,
            column=column.name,
            difference=(difference := bootstrap_interval(differences)),
            prompts=len(differences),
            p=p,
            p_holm=corrected,
            verdict=_verdict(column, difference.mean, corrected),
        )
        for (row, partner, column, differences), p, corrected in zip(
            made, p_values, holm(p_values), strict=True
        )
    )


def _partner(row: SettingResult, rows: Sequence[SettingResult], baseline: str | None) -> SettingResult | None:
    """The baseline at the same w, or its first setting: the choice never looks at results."""
    candidates = [other for other in rows if other.setting.method == baseline]
    alike = [other for other in candidates if other.setting.scale == row.setting.scale]
    return next(iter(alike or candidates), None)


def _differences(row: SettingResult, partner: SettingResult, column: str) -> list[float]:
    pairs = zip(row.values[column], partner.values[column], strict=True)
    return [float(np.subtract(one, two)) for one, two in pairs if one is not None and two is not None]


_ALPHA = 0.05


def _verdict(column: Column, difference: float, p_holm: float) -> str:
    if p_holm >= _ALPHA:
        return "unclear"
    if column.better == "neither":
        return "different"
    return "better" if (difference > 0) == (column.better == "higher") else "worse"
