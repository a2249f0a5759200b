"""Figures of a measurement, drawn with matplotlib's objects: no pyplot, no global state, no window."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

__all__ = ["draw_cost", "draw_scaling"]

_MEASURED, _PREDICTED = "#1f77b4", "#d62728"


def draw_cost(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Seconds per image of every contender.

    Args:
        rows: Of :func:`~emag_export.bench.report.describe_results`.
    """
    figure = Figure(figsize=(8, 0.8 + 0.45 * len(rows)), layout="constrained")
    ax = figure.subplots()
    names = [f"{row['method']}, {row['engine']}" for row in rows]
    colours = ["#9aa5b1" if row["method"] in ("cfg", "none") else _MEASURED for row in rows]
    bars = ax.barh(names, [row["seconds_per_image"] for row in rows], color=colours)
    ax.bar_label(bars, fmt="%.2f", padding=3)
    ax.invert_yaxis()
    ax.set_xlabel("seconds per image")
    ax.spines[["top", "right"]].set_visible(False)
    return figure


def draw_scaling(points: Sequence[Mapping[str, Any]]) -> Figure:
    """Measured cost over CFG against each axis, beside what the row-blocks predict.

    Args:
        points: Of :func:`~emag_export.bench.scaling.measure_scaling`.
    """
    axes = list(dict.fromkeys(point["axis"] for point in points))
    figure = Figure(figsize=(3.6 * len(axes), 3.4), layout="constrained")
    for ax, axis in zip(figure.subplots(1, len(axes), squeeze=False)[0], axes, strict=True):
        chosen = [point for point in points if point["axis"] == axis]
        xs = [point["value"] for point in chosen]
        measured = [point["ratio"] for point in chosen]
        spread = [
            [point["ratio"] - point["low"] for point in chosen],
            [point["high"] - point["ratio"] for point in chosen],
        ]
        ax.errorbar(xs, measured, yerr=spread, fmt="o", color=_MEASURED, capsize=3, label="measured")
        predicted = [point["row_blocks"] for point in chosen]
        ax.plot(xs, predicted, "_", color=_PREDICTED, markersize=18, label="row-blocks")
        ax.fill_between(
            xs, [0.9 * p for p in predicted], [1.1 * p for p in predicted], color=_PREDICTED, alpha=0.1
        )
        ax.set_xlabel(axis)
        ax.set_ylim(0.9, max(1.6, 1.1 * max(measured)))
    figure.axes[0].set_ylabel("time, CFG = 1")
    figure.axes[0].legend(fontsize="small")
    return figure
