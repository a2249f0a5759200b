"""How far a picture is from a drawing of its prompt: outlines, colours, places and sizes, all continuous."""

from collections.abc import Iterable

import numpy as np

from emag_export.evaluation.metrics.fit import Cover, FittedItem, FittedScene, fit_scene
from emag_export.evaluation.metrics.protocol import Column, Pixels, Scores
from emag_export.evaluation.truth import ANY, Truth
from emag_export.tiny_sd3.checker import to_canvas
from emag_export.tiny_sd3.palette import COLOURS, palette
from emag_export.tiny_sd3.scenes import (
    CENTRE_JITTER,
    DIRECTION,
    Item,
    Scene,
    away_range,
    coverage,
    radius_range,
)

__all__ = ["Drawn"]

_LEVELS = 255.0


class Drawn:
    """Distance to the nearest drawing of the prompt.

    Args:
        truth: Reads prompts.
    """

    name = "drawn"
    columns = (
        Column(
            name="shape_iou",
            better="higher",
            summary="overlap of each object with the fitted outline of its shape; 0 where it is absent",
        ),
        Column(
            name="edge_error",
            better="lower",
            unit="px",
            summary="area between object and fitted outline, per length of the outline",
        ),
        Column(
            name="colour_error",
            better="lower",
            unit="levels",
            summary="RMS distance of fitted colours to those asked for, of 255",
        ),
        Column(
            name="residual",
            better="lower",
            unit="levels",
            summary="RMS of what the fitted drawing does not explain: texture, blur, further objects",
        ),
        Column(
            name="place_error",
            better="lower",
            unit="px",
            summary="distance to the area that the words mean; of objects that are there",
        ),
        Column(
            name="size_error",
            better="lower",
            unit="px",
            summary="distance of the radius to the range that the word means; of objects that are there",
        ),
    )

    def __init__(self, truth: Truth) -> None:
        self._truth = truth

    def key(self) -> str:
        """Changes with the way of measuring."""
        return "drawn-1"

    def score(self, prompt: str, pixels: Pixels) -> Scores:
        """Fit the scene of the prompt and measure what is left."""
        scene = self._truth(prompt)
        if scene is None:
            return {column.name: None for column in self.columns}
        canvas = to_canvas(pixels)
        fit = fit_scene(canvas, scene)
        pairs = list(zip(scene.items, fit.items, strict=True))
        overlaps, edges = zip(*(_outline(asked, found) for asked, found in pairs), strict=True)
        return {
            "shape_iou": float(np.mean(overlaps)),
            "edge_error": float(np.mean(edges)),
            "colour_error": _colour_error(scene, fit),
            "residual": _LEVELS * float(np.sqrt(np.mean((canvas - fit.rendered) ** 2))),
            "place_error": _mean(
                _place_error(scene, number, found.item)
                for number, (_, found) in enumerate(pairs)
                if found is not None and scene.items[number].size != ANY
            ),
            "size_error": _mean(
                _outside(found.item.radius, _radii(scene, asked))
                for asked, found in pairs
                if found is not None and asked.size != ANY
            ),
        }


def _mean(numbers: Iterable[float]) -> float | None:
    found = list(numbers)
    return float(np.mean(found)) if found else None


def _outline(asked: Item, found: FittedItem | None) -> tuple[float, float]:
    """Overlap, and pixels between the outlines; an absent object is as far off as it is large."""
    if found is None:
        template = coverage(_typical(asked))
        return 0.0, float(template.sum()) / _length(template)
    union = float(np.maximum(found.template, found.seen).sum())
    overlap = float(np.minimum(found.template, found.seen).sum()) / union
    return overlap, float(np.abs(found.template - found.seen).sum()) / _length(found.template)


def _typical(asked: Item) -> Item:
    low, high = radius_range(asked.size) if asked.size != ANY else (13.0, 20.0)
    return Item(shape=asked.shape, colour=asked.colour, size=asked.size, radius=(low + high) / 2)


def _length(cover: Cover) -> float:
    """Length of an outline, pixels: the slope of the coverage across it integrates to one."""
    down, right = np.gradient(cover)
    return float(np.hypot(down, right).sum())


def _colour_error(scene: Scene, fit: FittedScene) -> float:
    asked = [item.colour for item in scene.items]
    seen = [fit.background if found is None else found.colour for found in fit.items]
    if scene.background != ANY:
        asked, seen = [scene.background, *asked], [fit.background, *seen]
    wanted = palette()[[COLOURS.index(name) for name in asked]]
    return _LEVELS * float(np.mean(np.sqrt(np.mean((np.stack(seen) - wanted) ** 2, axis=1))))


def _radii(scene: Scene, asked: Item) -> tuple[float, float]:
    return radius_range(asked.size, placed=scene.position is not None, pair=len(scene.items) > 1)


def _place_error(scene: Scene, number: int, found: Item) -> float:
    """Distance to the rectangle in which training pictures have this object."""
    words = scene.position or scene.relation
    aside = (-CENTRE_JITTER, CENTRE_JITTER)
    if words is None:
        if len(scene.items) > 1:  # "and": anywhere
            return 0.0
        return float(np.hypot(_outside(found.x, aside), _outside(found.y, aside)))
    along_x, along_y = DIRECTION[words]
    sign = -1 if number else 1
    away = away_range(found.radius, pair=len(scene.items) > 1)
    along, across = (found.x, found.y) if along_x else (found.y, found.x)
    along *= sign * (along_x + along_y)
    return float(np.hypot(_outside(along, (min(away), max(away))), _outside(across, aside)))


def _outside(number: float, limits: tuple[float, float]) -> float:
    low, high = limits
    return max(low - number, number - high, 0.0)
