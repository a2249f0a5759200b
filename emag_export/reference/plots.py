"""The figure of a comparison, drawn with matplotlib's objects: no pyplot, no global state, no window."""

from collections.abc import Iterator

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from emag_export.reference.comparison import Comparison
from emag_export.runtime.sampling.plan import Phase

__all__ = ["draw"]

_PHASE_COLOURS = {Phase.PLAIN: "#ffffff", Phase.TRACK: "#eef3fb", Phase.GUIDE: "#fdf1e3"}
_BLOCK_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#17becf")
_MOST_IMAGES = 4
"""Delta is drawn for so many images; the table and the JSON have all."""
_LOG_FLOOR = 1e-9
"""Differences below are drawn here: a logarithmic axis has no zero. It comes second in ``max``, which
then lets NaN through as a gap instead of drawing it as the best value of all."""


def draw(comparison: Comparison) -> Figure:
    """Error per step, Delta and choice per image, and the free run, one below the other."""
    chooses = any(step.choices for step in comparison.steps)
    images = min(_MOST_IMAGES, len(comparison.free[0].reference_blocks)) if chooses else 0
    guides = comparison.direction is not None
    count = 2 + guides + images
    figure = Figure(figsize=(10, 3.2 * count), layout="constrained")
    axes = figure.subplots(count, 1, squeeze=False)[:, 0]
    _draw_errors(axes[0], comparison)
    if guides:
        _draw_direction(axes[1], comparison)
    for image in range(images):
        _draw_delta(axes[1 + guides + image], comparison, image)
    _draw_free(axes[-1], comparison)
    for ax in axes:
        _shade_phases(ax, comparison)
        ax.set_xlabel("step")
        ax.set_xlim(-0.5, len(comparison.steps) - 0.5)
    return figure


def _draw_errors(ax: Axes, comparison: Comparison) -> None:
    threshold = comparison.threshold
    outputs = list(dict.fromkeys(name for step in comparison.steps for name in step.errors))
    for number, name in enumerate(outputs):
        for attribute, style, label in (("errors", ".-", name), ("floor", ":", None)):
            points = [
                (step.index, max(error.relative if threshold.relative else error.max_abs, _LOG_FLOOR))
                for step in comparison.steps
                if (error := getattr(step, attribute).get(name)) is not None
            ]
            if points:
                ax.plot(*zip(*points, strict=True), style, color=f"C{number}", label=label)
    ax.axhline(threshold.velocity, color="black", linestyle="--", linewidth=1, label="threshold (velocities)")
    kind = "relative to the largest value" if threshold.relative else "largest absolute"
    ax.set_yscale("log")
    ax.set_ylabel(f"error, {kind}")
    floor = " (dotted: PyTorch in the same precision)" if comparison.floor else ""
    ax.set_title(f"Teacher-forced: one step on the reference's state{floor}")
    ax.legend(ncols=3, fontsize="small")


def _draw_direction(ax: Axes, comparison: Comparison) -> None:
    """The engine's error of c - p in every guided step, and PyTorch's in half precision."""
    guided = [step for step in comparison.steps if step.direction is not None]
    lines = {
        "engine": {step.index: step.direction.error for step in guided if step.direction is not None},
        **{
            f"PyTorch, {name}": {
                step.index: step.direction_floors[name].error
                for step in guided
                if name in step.direction_floors
            }
            for name in comparison.direction_floors
        },
    }
    for label, points in lines.items():
        style = ".-" if label == "engine" else ".:"
        ax.plot(list(points), [max(error, _LOG_FLOOR) for error in points.values()], style, label=label)
    if comparison.threshold.direction is not None:
        limit = comparison.threshold.direction.error
        ax.axhline(limit, color="black", linestyle="--", linewidth=1, label="threshold of the mean")
    ax.set_yscale("log")
    ax.set_ylabel("error of c - p, of its norm")
    ax.set_title("What is left of the direction that guidance steers along")
    ax.legend(ncols=3, fontsize="small")


def _draw_delta(ax: Axes, comparison: Comparison, image: int) -> None:
    """Solid lines: reference; crosses: engine. Rings and squares mark the block each would choose next."""
    tracked = [step for step in comparison.steps if step.phase != Phase.PLAIN]
    xs = [step.index for step in tracked]
    for layer, block in enumerate(comparison.blocks):
        colour = _BLOCK_COLOURS[layer % len(_BLOCK_COLOURS)]
        ax.plot(
            xs, [step.reference_delta[image][layer] for step in tracked], color=colour, label=f"block {block}"
        )
        ax.plot(xs, [step.engine_delta[image][layer] for step in tracked], "x", color=colour, markersize=5)
    marks = (("o", 10, "chosen by the reference"), ("s", 13, "chosen by the engine"))
    for (marker, size, label), points in zip(
        marks, zip(*_chosen(comparison, image), strict=True), strict=False
    ):
        ax.plot(
            *zip(*points, strict=True), marker, markersize=size, fillstyle="none", color="black", label=label
        )
    ax.set_ylabel("Delta")
    ax.set_title(f"Delta of image {image}: reference (lines), engine (crosses)")
    if tracked:
        ax.legend(ncols=3, fontsize="small")


def _chosen(comparison: Comparison, image: int) -> Iterator[tuple[tuple[int, float], tuple[int, float]]]:
    """Per step where each side's choice lies in the picture."""
    for step in comparison.steps:
        if step.choices:
            choice, index = step.choices[image], comparison.blocks.index
            yield (
                (step.index, step.reference_delta[image][index(choice.reference)]),
                (step.index, step.engine_delta[image][index(choice.engine)]),
            )


def _draw_free(ax: Axes, comparison: Comparison) -> None:
    xs = [step.index for step in comparison.free]
    ax.plot(xs, [max(step.max_abs, _LOG_FLOOR) for step in comparison.free], marker=".", color="#1f77b4")
    for step in comparison.free:
        if not step.agree:
            ax.axvline(step.index, color="#d62728", linewidth=1, alpha=0.6)
    limit = comparison.threshold.free
    if limit is not None:
        ax.axhline(limit, color="black", linestyle="--", linewidth=1)
    ax.set_yscale("log")
    ax.set_ylabel("latents, largest difference")
    ax.set_title("Free run: own state, own choices (red: the sides perturb different blocks)")


def _shade_phases(ax: Axes, comparison: Comparison) -> None:
    for step in comparison.steps:
        ax.axvspan(step.index - 0.5, step.index + 0.5, color=_PHASE_COLOURS[step.phase], zorder=0)
