"""Fit the renderer to a picture: where a scene's objects are, how large and of which colour; numpy only.

Places and radii are found to fractions of a pixel by damped Gauss-Newton steps. Colours are free as well, but
enter linearly: for every trial they are solved for, so that only three numbers per object are searched.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float

from emag_export.tiny_sd3.checker import fit_template, frame_colour, grow, largest, solid
from emag_export.tiny_sd3.palette import COLOURS, nearest_colour, palette
from emag_export.tiny_sd3.scenes import CANVAS, Item, Scene, coverage

__all__ = ["Canvas", "FittedItem", "FittedScene", "fit_scene"]

Colour = Float[np.ndarray, "channels"]
Canvas = Float[np.ndarray, "64 64 3"]
Cover = Float[np.ndarray, "64 64"]
Mask = Bool[np.ndarray, "64 64"]

_SMALLEST_OBJECT = 15
"""Pixels; the checker finds nothing smaller either."""
_LEAST_CONTRAST = 0.1
"""Of an object's colour to the background's, Euclidean, sRGB from 0 to 1: less is not there."""
_ITERATIONS = 25
_STEP = 0.05
"""Pixels of the central differences: well inside an antialiased edge, which is one pixel wide."""
_FARTHEST = 5.0
"""Pixels from where the search began; farther off it has left its object."""
_RADII = (3.0, CANVAS / 2)
_MARGIN = 3
"""Pixels around an object that belong to it: its blurred edge."""


@dataclass(frozen=True, kw_only=True)
class FittedItem:
    """One object as it is in the picture."""

    item: Item
    """As asked for, with the place and radius that were found."""
    colour: Colour
    """sRGB, 0 to 1."""
    template: Cover
    """Coverage of the fitted outline."""
    seen: Cover
    """Coverage in the picture: how far each pixel is from the background's colour towards the object's."""


@dataclass(frozen=True, kw_only=True)
class FittedScene:
    """A scene as it is in the picture."""

    items: tuple[FittedItem | None, ...]
    """In the order of the scene; None where there is no such object."""
    background: Colour
    """sRGB, 0 to 1."""
    rendered: Canvas
    """The fitted scene, drawn in the fitted colours."""


def fit_scene(canvas: Canvas, scene: Scene) -> FittedScene:
    """Find every object of a scene in a picture and fit its outline.

    Each is looked for by its colour, and where that is absent among whatever else is not background: an
    object of the wrong colour has a place and a shape, too.

    Args:
        canvas: The picture, sRGB, 0 to 1.
        scene: What was asked for; places and radii are not used.
    """
    index = nearest_colour(canvas)
    ground = frame_colour(index)
    blobs = _blobs(index, ground, scene)
    began = [
        None if blob is None else _begin(canvas, palette()[ground], blob, item)
        for item, blob in zip(scene.items, blobs, strict=True)
    ]
    found = [item for item in began if item is not None]
    refined = _refine(canvas, found)
    covers = [coverage(item) for item in refined]
    colours = _colours(canvas, covers)
    rendered = _render(covers, colours)
    pairs = iter(zip(refined, covers, colours[1:], strict=True))
    fitted: list[FittedItem | None] = []
    for blob in blobs:
        if blob is None:
            fitted.append(None)
            continue
        item, cover, colour = next(pairs)
        others = sum((other for other in covers if other is not cover), np.zeros_like(cover))
        fitted.append(_fitted(canvas, colours[0], (item, cover, colour), (blob, others > 0.5)))
    return FittedScene(items=tuple(fitted), background=colours[0], rendered=rendered)


def _blobs(index: np.ndarray, ground: int, scene: Scene) -> list[Mask | None]:
    """The pixels of each object."""
    free = index != ground
    blobs: list[Mask | None] = []
    for item in scene.items:
        number = COLOURS.index(item.colour)
        blob = largest(solid(index == number)) if number != ground else np.zeros_like(free)
        blobs.append(blob if blob.sum() >= _SMALLEST_OBJECT else None)
        if blobs[-1] is not None:
            free &= ~grow(blob, 2)
    for place, blob_or_none in enumerate(blobs):
        if blob_or_none is None:
            rest = largest(solid(free))
            if rest.sum() >= _SMALLEST_OBJECT:
                blobs[place] = rest
                free &= ~grow(rest, 2)
    return blobs


def _begin(canvas: Canvas, ground: Colour, blob: Mask, item: Item) -> Item:
    """Where the search begins: the outline with the area and centroid of the object."""
    way = np.median(canvas[blob], axis=0) - ground
    alpha = np.clip((canvas - ground) @ way / max(float(way @ way), 1e-6), 0, 1) * grow(blob, _MARGIN)
    return fit_template(np.asarray(alpha, dtype=np.float32), item)[0]


def _refine(canvas: Canvas, items: list[Item]) -> list[Item]:
    """Least squares over places and radii of all objects together (Levenberg-Marquardt)."""
    if not items:
        return items
    start = np.array([number for item in items for number in (item.x, item.y, item.radius)])

    def residual(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        covers = [coverage(item) for item in _moved(items, numbers)]
        colours = _colours(canvas, covers)
        return (_render(covers, colours) - canvas).ravel(), colours

    best, damping = start, 1e-3
    error, colours = residual(best)
    for _ in range(_ITERATIONS):
        jacobian = _jacobian(items, best, colours)
        square, slope = jacobian.T @ jacobian, jacobian.T @ error
        step = -np.linalg.solve(square + damping * np.diag(np.diag(square) + 1e-9), slope)
        trial = best + np.clip(step, -2, 2)
        if not _near(trial, start):
            damping *= 10
            continue
        trial_error, trial_colours = residual(trial)
        if trial_error @ trial_error < error @ error:
            best, error, colours, damping = trial, trial_error, trial_colours, damping / 5
        else:
            damping *= 5
        if np.abs(step).max() < 1e-3 or damping > 1e6:
            break
    return _moved(items, best)


def _near(numbers: np.ndarray, start: np.ndarray) -> bool:
    low, high = _RADII
    radii = numbers[2::3]
    return bool(np.abs(numbers - start).max() <= _FARTHEST and radii.min() >= low and radii.max() <= high)


def _jacobian(items: list[Item], numbers: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Derivative of the drawn picture by every place and radius, colours held."""
    columns = []
    for place in range(len(numbers)):
        which = place // 3
        ends = []
        for sign in (1, -1):
            moved = numbers.copy()
            moved[place] += sign * _STEP
            ends.append(coverage(_moved(items, moved)[which]))
        change = (ends[0] - ends[1]) / (2 * _STEP)
        columns.append((change[:, :, None] * (colours[1 + which] - colours[0])).ravel())
    return np.stack(columns, axis=1).astype(np.float64)


def _moved(items: list[Item], numbers: np.ndarray) -> list[Item]:
    return [
        replace(item, x=float(x), y=float(y), radius=float(radius))
        for item, (x, y, radius) in zip(items, numbers.reshape(-1, 3), strict=True)
    ]


def _weights(covers: list[Cover]) -> np.ndarray:
    """How much of each colour a pixel has: the background's, and every object's."""
    total = sum(covers, np.zeros((CANVAS, CANVAS), dtype=np.float32))
    return np.stack([1 - np.minimum(total, 1), *covers], axis=-1).astype(np.float64)


def _colours(canvas: Canvas, covers: list[Cover]) -> np.ndarray:
    """Colours that fit best, the background's first."""
    weights = _weights(covers).reshape(-1, 1 + len(covers))
    square = weights.T @ weights + 1e-6 * np.eye(1 + len(covers))
    return np.asarray(np.linalg.solve(square, weights.T @ canvas.reshape(-1, 3)))


def _render(covers: list[Cover], colours: np.ndarray) -> np.ndarray:
    return np.asarray(_weights(covers) @ colours)


def _fitted(
    canvas: Canvas,
    ground: np.ndarray,
    found: tuple[Item, Cover, np.ndarray],
    where: tuple[Mask, Mask],
) -> FittedItem | None:
    """Measure the object's coverage in the picture, other objects left out."""
    item, cover, colour = found
    blob, others = where
    way = colour - ground
    if float(np.linalg.norm(way)) < _LEAST_CONTRAST:
        return None
    alpha = np.clip((canvas - ground) @ way / (way @ way), 0, 1)
    region = (grow(blob, _MARGIN) | grow(cover > 0.5, _MARGIN)) & ~grow(others, 1)
    return FittedItem(item=item, colour=colour, template=cover, seen=np.where(region, alpha, 0))
