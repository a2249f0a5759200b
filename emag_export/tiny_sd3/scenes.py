"""What a tiny-sd3 picture shows: scenes, how they are sampled, and how they are drawn; numpy only.

A scene has one object, somewhere on the canvas, or two objects beside or above each other. Lengths are pixels
of the 64 x 64 canvas, ``x`` grows to the right and ``y`` downwards, both measured from the canvas centre.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, UInt8

from emag_export.tiny_sd3.palette import COLOURS, RGB

CANVAS = 64
"""Height and width of every training picture, pixels."""

SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "ring", "cross")
SIZES: tuple[str, ...] = ("large", "small")
POSITIONS: tuple[str, ...] = ("left", "right", "top", "bottom")
RELATIONS: tuple[str, ...] = ("left of", "right of", "above", "below")

LARGE_FROM = 12.25
"""An object whose radius is at least this many pixels is large; none is drawn between 11 and 13.5."""

OFF_CENTRE = 8.0
"""An object said to be at a side of the canvas is drawn at least this many pixels from the centre."""

CENTRE_JITTER = 4.0
"""Off the axis along which it is placed, an object lies at most this many pixels from the centre."""

DIRECTION = {
    "left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1),
    "left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1),
}  # fmt: skip
"""Where a position, or the first object of a relation, lies: signs along x and y."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One drawn object.

    Attributes:
        shape: One of :data:`SHAPES`.
        colour: One of :data:`~.palette.COLOURS`.
        size: One of :data:`SIZES`.
        x: Centre, pixels right of the canvas centre.
        y: Centre, pixels below the canvas centre.
        radius: Radius of the circle around the shape, pixels.
    """

    shape: str
    colour: str
    size: str
    x: float = 0.0
    y: float = 0.0
    radius: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A background and one or two objects of different colours.

    Attributes:
        background: One of :data:`~.palette.COLOURS`, different from every object's.
        items: One or two objects.
        position: One of :data:`POSITIONS`, or None for the middle; None with two objects.
        relation: One of :data:`RELATIONS`, read as "first object ... second object"; None with one object.
    """

    background: str
    items: tuple[Item, ...]
    position: str | None = None
    relation: str | None = None


def sample_scene(rng: np.random.Generator) -> Scene:
    """Draw a scene at random: 55 % single objects (40 % of them off centre), 45 % pairs.

    Args:
        rng: The only source of randomness.

    Returns:
        A scene whose objects lie wholly on the canvas and do not touch.
    """
    background, first, second = (str(name) for name in rng.choice(COLOURS, 3, replace=False))
    if rng.random() < 0.55:
        position = str(rng.choice(POSITIONS)) if rng.random() < 0.4 else None
        return Scene(background=background, items=(_single(rng, first, position),), position=position)
    relation = str(rng.choice(RELATIONS))
    return Scene(background=background, items=_pair(rng, (first, second), relation), relation=relation)


def draw(scene: Scene, canvas: int = CANVAS) -> UInt8[np.ndarray, "canvas canvas 3"]:
    """Paint a scene with antialiased edges.

    Args:
        scene: What to paint; lengths are scaled by ``canvas / 64``.
        canvas: Height and width of the picture, pixels.

    Returns:
        sRGB, 0 to 255.
    """
    image = np.broadcast_to(np.asarray(RGB[scene.background], dtype=np.float32), (canvas, canvas, 3))
    for item in scene.items:
        cover = coverage(item, canvas)[:, :, None]
        image = image * (1 - cover) + np.asarray(RGB[item.colour], dtype=np.float32) * cover
    return np.rint(image).astype(np.uint8)


def coverage(item: Item, canvas: int = CANVAS) -> Float[np.ndarray, "canvas canvas"]:
    """Measure how much of each pixel an object covers, from the signed distance to its outline.

    Args:
        item: The object; its colour and size word are not used.
        canvas: Height and width of the picture, pixels.

    Returns:
        0 (outside) to 1 (inside).
    """
    scale = canvas / CANVAS
    grid = (np.arange(canvas, dtype=np.float32) + 0.5) / scale - CANVAS / 2
    x, y = grid[None, :] - np.float32(item.x), grid[:, None] - np.float32(item.y)
    return np.clip(0.5 - _distance(item.shape, x, y, item.radius) * scale, 0, 1).astype(np.float32)


def radius_range(size: str, *, placed: bool = False, pair: bool = False) -> tuple[float, float]:
    """Least and largest radius that a size word means, pixels.

    Args:
        size: One of :data:`SIZES`.
        placed: The object is alone and at a side of the canvas.
        pair: It is one of two.
    """
    if size == "small":
        return 9.0, 11.0
    if pair:
        return 13.5, 14.5
    return 14.5, 16.0 if placed else 20.0


def away_range(radius: float, *, pair: bool = False) -> tuple[float, float]:
    """Least and largest distance from the canvas centre along the direction of a position or relation.

    Args:
        radius: Of the object, pixels.
        pair: It is one of two.
    """
    edge = CANVAS / 2 - 1 - radius
    return (max(radius + 1.5, 13.0), min(edge, 18.0)) if pair else (OFF_CENTRE + 2, edge)


def placed(scene: Scene, rng: np.random.Generator) -> Scene:
    """Choose places and radii that the words of a scene allow, as :func:`sample_scene` does.

    Args:
        scene: One or two objects; two without a relation get one at random.
        rng: The only source of randomness.

    Returns:
        The same words, with objects that lie wholly on the canvas and do not touch.
    """
    if len(scene.items) == 1:
        return replace(scene, items=(_place_alone(scene.items[0], scene.position, rng),))
    relation = scene.relation or str(rng.choice(RELATIONS))
    first, second = (
        _place_in_pair(item, relation, sign, rng) for sign, item in zip((1, -1), scene.items, strict=True)
    )
    return replace(scene, items=(first, second))


def _single(rng: np.random.Generator, colour: str, position: str | None) -> Item:
    return _place_alone(_words(rng, colour), position, rng)


def _pair(rng: np.random.Generator, colours: tuple[str, str], relation: str) -> tuple[Item, Item]:
    first, second = (
        _place_in_pair(_words(rng, colour), relation, sign, rng)
        for sign, colour in zip((1, -1), colours, strict=True)
    )
    return first, second


def _words(rng: np.random.Generator, colour: str) -> Item:
    size, shape = str(rng.choice(SIZES)), str(rng.choice(SHAPES))
    return Item(shape=shape, colour=colour, size=size)


def _place_alone(item: Item, position: str | None, rng: np.random.Generator) -> Item:
    radius = rng.uniform(*radius_range(item.size, placed=position is not None))
    x, y = rng.uniform(-CENTRE_JITTER, CENTRE_JITTER, 2)
    if position is not None:
        away = rng.uniform(*away_range(radius))
        along_x, along_y = DIRECTION[position]
        x, y = (along_x * away, y) if along_x else (x, along_y * away)
    return replace(item, x=float(x), y=float(y), radius=float(radius))


def _place_in_pair(item: Item, relation: str, sign: int, rng: np.random.Generator) -> Item:
    along_x, along_y = DIRECTION[relation]
    radius = rng.uniform(*radius_range(item.size, pair=True))
    away = sign * rng.uniform(*away_range(radius, pair=True))
    aside = rng.uniform(-CENTRE_JITTER, CENTRE_JITTER)
    x, y = (along_x * away, aside) if along_x else (aside, along_y * away)
    return replace(item, x=float(x), y=float(y), radius=float(radius))


Grid = Float[np.ndarray, "_ _"]


def _distance(shape: str, x: Grid, y: Grid, radius: float) -> Grid:
    """Signed distance to a shape's outline, pixels, negative inside; exact along straight edges."""
    if shape == "circle":
        return np.asarray(np.hypot(x, y) - radius)
    if shape == "ring":
        return np.asarray(np.abs(np.hypot(x, y) - 0.76 * radius) - 0.24 * radius)
    if shape == "square":
        return np.asarray(np.maximum(np.abs(x), np.abs(y)) - 0.86 * radius)
    if shape == "cross":
        wide = np.maximum(np.abs(x) - radius, np.abs(y) - 0.36 * radius)
        return np.asarray(np.minimum(wide, np.maximum(np.abs(x) - 0.36 * radius, np.abs(y) - radius)))
    if shape == "triangle":
        slope = np.float32(np.sqrt(3) / 2) * np.abs(x) - (y - 0.25 * radius) * 0.5
        return np.asarray(np.maximum(slope - 0.625 * radius, (y - 0.25 * radius) - 0.5 * 1.25 * radius))
    if shape == "star":
        return _star_distance(x, y, radius)
    raise ValueError(
        f"shape is {shape!r}, wanted one of {', '.join(SHAPES)}; add its outline to scenes._distance"
    )


def _star_distance(x: Grid, y: Grid, radius: float) -> Grid:
    """Five-pointed star, one point up, inner corners at 0.45 of the radius: fold the plane to one edge."""
    angle = np.abs((np.arctan2(x, -y) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
    length = np.hypot(x, y)
    px, py = length * np.cos(angle), length * np.sin(angle)
    tip = np.array([radius, 0.0])
    corner = 0.45 * radius * np.array([np.cos(np.pi / 5), np.sin(np.pi / 5)])
    edge = (corner - tip) / np.linalg.norm(corner - tip)
    return np.asarray((px - tip[0]) * edge[1] - (py - tip[1]) * edge[0])
