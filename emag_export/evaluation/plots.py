"""Quality against cost, drawn with matplotlib's objects."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from emag_export.evaluation.results import Results, SettingResult
from emag_export.evaluation.statistics import Interval

__all__ = ["draw_contrast", "draw_pareto", "pareto_front"]

_MARKERS = "osD^v<>PX*hp"
_APART = 0.015


def pareto_front(rows: Sequence[SettingResult], quality: str, *, higher: bool) -> list[SettingResult]:
    """Settings that no other one beats in cost and quality, the cheapest first.

    Args:
        rows: All settings.
        quality: A column.
        higher: Larger values are better.
    """
    sign = 1 if higher else -1
    measured = [row for row in rows if quality in row.intervals]
    ranked = sorted(measured, key=lambda row: (row.cost, -sign * row.intervals[quality].mean))
    front: list[SettingResult] = []
    for row in ranked:
        if not front or sign * row.intervals[quality].mean > sign * front[-1].intervals[quality].mean:
            front.append(row)
    return front


def draw_pareto(results: Results) -> Figure:
    """Every setting with its intervals, and the line of those that no other one beats.

    The thin interval is of the mean, and mostly says how prompts differ. The thick one is of the paired
    difference from the baseline, laid around the mean: where it does not reach the baseline, they differ.
    """
    column = results.column(results.quality)
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    ax = figure.subplots()
    places = _places(results.settings)
    apart = {test.setting: test.difference for test in results.tests if test.column == results.quality}
    series = list(dict.fromkeys(row.setting.series for row in results.settings))
    for number, name in enumerate(series):
        rows = [
            row for row in results.settings if row.setting.series == name and results.quality in row.intervals
        ]
        if not rows:
            continue
        found = [row.intervals[results.quality] for row in rows]
        ax.errorbar(
            [places[row.setting.label] for row in rows],
            [interval.mean for interval in found],
            yerr=_around(found),
            fmt=_MARKERS[number % len(_MARKERS)],
            color=f"C{number}",
            elinewidth=0.6,
            capsize=2,
            label=rows[0].setting.label if len(rows) == 1 else name,
        )
        paired = [(row, apart[row.setting.label]) for row in rows if row.setting.label in apart]
        ax.errorbar(
            [places[row.setting.label] for row, _ in paired],
            [row.intervals[results.quality].mean for row, _ in paired],
            yerr=_around([difference for _, difference in paired]),
            fmt="none",
            color=f"C{number}",
            elinewidth=3,
        )
        for row, interval in zip(rows, found, strict=True) if len(rows) > 1 else ():
            scales = row.setting.label.removeprefix(name).removeprefix(", ")
            where = (places[row.setting.label], interval.mean)
            ax.annotate(scales, where, (6, 4), textcoords="offset points", fontsize="x-small")
    front = pareto_front(results.settings, results.quality, higher=column.better == "higher")
    ax.step(
        [row.cost for row in front],
        [row.intervals[results.quality].mean for row in front],
        where="post",
        color="0.6",
        linewidth=1,
        zorder=0,
        label="no other is better and cheaper",
    )
    unit = f", {column.unit}" if column.unit else ""
    ax.margins(x=0.12)
    ax.set_xlabel("row-blocks, relative to classifier-free guidance; equal ones are drawn side by side")
    ax.set_ylabel(f"{column.name}{unit} ({column.better} is better)")
    ax.set_title(
        f"Means over {len(results.prompts)} prompts; 95 %: thin, of the mean; thick, of the difference from "
        f"{results.facts.get('baseline')}",
        fontsize="medium",
    )
    figure.legend(fontsize="small", loc="outside right upper")
    return figure


def _around(intervals: Sequence[Interval]) -> list[list[float]]:
    return [[one.mean - one.low for one in intervals], [one.high - one.mean for one in intervals]]


def draw_contrast(results: Results) -> Figure:
    """How far the hard negative lies from the prompt in every step, and how fine the difference is."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    far, fine = figure.subplots(1, 2)
    for number, (label, row) in enumerate(results.contrast.items()):
        steps, marker = [one.step for one in row], _MARKERS[number % len(_MARKERS)]
        far.plot(steps, [one.ratio for one in row], marker=marker, markersize=4, label=label)
        fine.plot(steps, [one.near for one in row], marker=marker, markersize=4)
    longest = max(results.contrast.values(), key=len)
    fine.plot([one.step for one in longest], [one.far for one in longest], color="0.4", linestyle="--")
    far.set_ylabel("|c − p| / |c − u|")
    far.set_ylim(bottom=0)
    fine.set_ylabel("mean frequency of c − p (dashed: of c − u)")
    for ax in (far, fine):
        ax.set_xlabel("step")
    figure.legend(fontsize="small", loc="outside right upper")
    return figure


def _places(rows: Sequence[SettingResult]) -> dict[str, float]:
    """Where each setting is drawn: at its cost, those of equal cost side by side."""
    places: dict[str, float] = {}
    for cost in dict.fromkeys(row.cost for row in rows):
        alike = [row.setting.label for row in rows if row.cost == cost]
        for number, label in enumerate(alike):
            places[label] = cost + _APART * (number - (len(alike) - 1) / 2)
    return places
