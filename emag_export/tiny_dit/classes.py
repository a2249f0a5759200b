"""The 48 classes of tiny-dit, one per shape and colour, and random scenes of a class; numpy only."""

from __future__ import annotations

import itertools

import numpy as np

from emag_export.tiny_sd3.captions import SYNONYMS
from emag_export.tiny_sd3.palette import COLOURS
from emag_export.tiny_sd3.scenes import CANVAS, SHAPES, Item, Scene

CLASSES: tuple[tuple[str, str], ...] = tuple((colour, shape) for shape in SHAPES for colour in COLOURS)
"""Colour and shape of every class; the place in the tuple is the label."""

SMALLEST, LARGEST = 13.0, 20.0
"""Range of an object's radius, pixels."""


def class_names(label: int) -> list[str]:
    """Name a class: ``red circle`` first, then what else it may be called, such as ``red disc``.

    Args:
        label: 0 to 47.

    Returns:
        Names that no other class has.
    """
    words = [(word, *SYNONYMS.get(word, ())) for word in CLASSES[label]]
    return [" ".join(name) for name in itertools.product(*words)]


def id2label() -> dict[int, str]:
    """Write all names as diffusers' DiTPipeline stores them: label to names, separated by commas."""
    return {label: ", ".join(class_names(label)) for label in range(len(CLASSES))}


def sample_class_scene(label: int, rng: np.random.Generator) -> Scene:
    """Draw a scene of a class at random: the object's place and size, and the background's colour.

    Args:
        label: 0 to 47.
        rng: The only source of randomness.

    Returns:
        A scene with one object, wholly on the canvas with a margin of a pixel.
    """
    colour, shape = CLASSES[label]
    background = str(rng.choice([other for other in COLOURS if other != colour]))
    radius = rng.uniform(SMALLEST, LARGEST)
    room = CANVAS / 2 - 1 - radius
    x, y = rng.uniform(-room, room, 2)
    item = Item(shape=shape, colour=colour, size="any", x=float(x), y=float(y), radius=float(radius))
    return Scene(background=background, items=(item,))
