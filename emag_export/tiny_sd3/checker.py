"""Does a picture show its scene? Colours by the palette, shapes by overlap with their templates; numpy only.

The checker knows nothing about the model. It finds each object by its colour, fits every shape's outline to
the pixels of that colour, and takes the shape that overlaps best.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from emag_export.tiny_sd3.palette import COLOURS, nearest_colour, palette
from emag_export.tiny_sd3.scenes import CANVAS, LARGE_FROM, OFF_CENTRE, SHAPES, Item, Scene, coverage

OVERLAP = 0.7
"""Least intersection over union of an object and its shape's template; drawn scenes reach 0.97 or more."""

APART = 5.0
"""Centres closer than this many pixels are neither left, right, above nor below of each other."""

_STRAY_PIXELS = 16
_SMALLEST_OBJECT = 15

Picture = UInt8[np.ndarray, "height width 3"]
Mask = Bool[np.ndarray, "64 64"]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What is right about one picture.

    Attributes:
        background: The frame of the picture has the background's colour.
        colour: Every object's colour is there.
        shape: Every object overlaps best, and enough, with its own shape.
        size: Every object is as large or small as said.
        place: The single object is where it is said to be, or the two are as related; true if unsaid.
        alone: Nothing else is in the picture.
    """

    background: bool
    colour: bool
    shape: bool
    size: bool
    place: bool
    alone: bool

    @property
    def right(self) -> bool:
        """Whether every attribute is right."""
        return all(getattr(self, field.name) for field in fields(self))


def check(image: Picture, scene: Scene) -> Verdict:
    """Compare a picture with the scene it should show.

    Args:
        image: sRGB, 0 to 255; side lengths that are multiples of 64 are averaged down to 64 x 64.
        scene: What was asked for; positions and radii of its objects are not used.

    Returns:
        The verdict.

    Raises:
        ValueError: The picture is not square or its side is no multiple of 64.
    """
    canvas = to_canvas(image)
    index = nearest_colour(canvas)
    background = frame_colour(index)
    found = [_find(canvas, index, background, item) for item in scene.items]
    seen = [item for item, _ in found if item is not None]
    complete = len(seen) == len(scene.items)
    return Verdict(
        background=COLOURS[background] == scene.background,
        colour=complete,
        shape=complete and all(
            fit.shape == item.shape and overlap >= OVERLAP
            for (fit, overlap), item in zip(found, scene.items, strict=True) if fit is not None
        ),
        size=complete and all(
            (fit.radius >= LARGE_FROM) == (item.size == "large")
            for fit, item in zip(seen, scene.items, strict=True)
        ),
        place=complete and _placed(scene, seen),
        alone=_alone(index, background, seen),
    )  # fmt: skip


def background_of(image: Picture) -> str:
    """Name the colour of a picture's frame, which is its background's; the picture is as in :func:`check`."""
    return COLOURS[frame_colour(nearest_colour(to_canvas(image)))]


def accuracy(verdicts: Iterable[Verdict]) -> dict[str, float]:
    """Average verdicts.

    Args:
        verdicts: One per picture, at least one.

    Returns:
        Share of pictures right in each attribute, and in all of them under ``right``, 0 to 1.
    """
    rows = list(verdicts)
    names = ["right", *(field.name for field in fields(Verdict))]
    return {name: sum(getattr(row, name) for row in rows) / len(rows) for name in names}


def frame_colour(index: Int[np.ndarray, "64 64"]) -> int:
    """Index of the colour that most pixels at the edge of the picture have."""
    frame = np.concatenate(
        [index[:2].ravel(), index[-2:].ravel(), index[:, :2].ravel(), index[:, -2:].ravel()]
    )
    return int(np.bincount(frame, minlength=len(COLOURS)).argmax())


def to_canvas(image: Picture) -> Float[np.ndarray, "64 64 3"]:
    """Average a picture down to the canvas, 0 to 1; arguments and errors as :func:`check`."""
    height, width = image.shape[:2]
    if height != width or height % CANVAS:
        raise ValueError(
            f"the picture is {width} x {height}, the checker takes squares whose side is a multiple of "
            f"{CANVAS}; resize it to {CANVAS} x {CANVAS}"
        )
    scale = height // CANVAS
    small = image.reshape(CANVAS, scale, CANVAS, scale, 3).mean((1, 3)) / 255.0
    return np.asarray(small, dtype=np.float32)


def _find(
    image: Float[np.ndarray, "64 64 3"], index: Int[np.ndarray, "64 64"], background: int, item: Item
) -> tuple[Item | None, float]:
    """Find an object by colour and fit every shape; returns the best fit and its overlap, 0 to 1."""
    blob = largest(solid(index == COLOURS.index(item.colour)))
    if item.colour == COLOURS[background] or blob.sum() < _SMALLEST_OBJECT:
        return None, 0.0
    # How far each pixel is on the way from the background's colour to the object's: its coverage.
    ground = palette()[background]
    way = palette()[COLOURS.index(item.colour)] - ground
    alpha = np.clip((image - ground) @ way / (way @ way), 0, 1) * grow(blob, 3)
    return max((fit_template(alpha, replace(item, shape=shape)) for shape in SHAPES), key=lambda fit: fit[1])


def fit_template(alpha: Float[np.ndarray, "64 64"], item: Item) -> tuple[Item, float]:
    """Lay a shape's template on the coverage: same area and centroid, then what overlaps best nearby."""
    grid = np.arange(CANVAS) + 0.5 - CANVAS / 2
    total = float(alpha.sum())
    x, y = float((alpha.sum(0) * grid).sum() / total), float((alpha.sum(1) * grid).sum() / total)
    area, drop = _moments(item.shape)
    radius = float(np.sqrt(total / area))
    best, overlap = item, 0.0
    for grown, right, down in itertools.product((-1, 0, 1), repeat=3):
        size = radius + 0.5 * grown
        trial = replace(item, x=x + 0.4 * right, y=y - drop * size + 0.4 * down, radius=size)
        template = coverage(trial)
        score = float(np.minimum(template, alpha).sum() / np.maximum(template, alpha).sum())
        if score > overlap:
            best, overlap = trial, score
    return best, overlap


@functools.cache
def _moments(shape: str) -> tuple[float, float]:
    """Area of a shape of radius 1, and how far its centroid lies below its centre."""
    cover = coverage(Item(shape=shape, colour="", size="", radius=25.0))
    grid = np.arange(CANVAS) + 0.5 - CANVAS / 2
    return float(cover.sum()) / 25**2, float((cover.sum(1) * grid).sum() / cover.sum()) / 25


def largest(mask: Mask) -> Mask:
    """Keep the largest connected part."""
    best, rest = np.zeros_like(mask), mask.copy()
    while rest.sum() > best.sum():
        part = np.zeros_like(mask)
        part.flat[rest.argmax()] = True
        while (grown := grow(part, 1) & rest).sum() > part.sum():
            part = grown
        best, rest = (part, rest & ~part) if part.sum() > best.sum() else (best, rest & ~part)
    return best


def grow(mask: Mask, pixels: int) -> Mask:
    """Add what is at most so many pixels away, diagonally too."""
    for _ in range(pixels):
        mask = _neighbours(mask) > 0
    return mask


def solid(mask: Mask) -> Mask:
    """Drop the thin seams where two colours blend into a third: keep what touches a 3 x 3 majority."""
    core = mask & (_neighbours(mask) >= 6)
    return np.asarray(mask & grow(core, 1))


def _neighbours(mask: Mask) -> Int[np.ndarray, "64 64"]:
    padded = np.pad(mask.astype(np.int64), 1)
    across = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
    return np.asarray(across[:-2] + across[1:-1] + across[2:])


def _placed(scene: Scene, seen: list[Item]) -> bool:
    if scene.relation is not None:
        right, down = seen[1].x - seen[0].x, seen[1].y - seen[0].y
        away = {"left of": right, "right of": -right, "above": down, "below": -down}[scene.relation]
        return away >= max(APART, abs(right), abs(down))
    if scene.position is not None:
        x, y = seen[0].x, seen[0].y
        return {"left": -x, "right": x, "top": -y, "bottom": y}[scene.position] >= max(
            OFF_CENTRE, abs(x), abs(y)
        )
    return True


def _alone(index: Int[np.ndarray, "64 64"], background: int, seen: list[Item]) -> bool:
    """Whether few pixels, blended edges aside, are neither background nor near a fitted object."""
    explained = index == background
    for item in seen:
        whole = "circle" if item.shape in ("circle", "ring", "star", "cross") else item.shape
        explained = explained | (coverage(replace(item, shape=whole, radius=item.radius + 2.5)) > 0.5)
    return int((_neighbours(~explained) >= 6).sum()) < _STRAY_PIXELS
