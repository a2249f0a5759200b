"""What a prompt of the embedded models asks for, as a scene that can be drawn and measured."""

from collections.abc import Callable, Sequence

import numpy as np

from emag_export.errors import InputError
from emag_export.evaluation.metrics.protocol import Pixels
from emag_export.labels import ClassLabels
from emag_export.tiny_dit.classes import CLASSES, id2label, sample_class_scene
from emag_export.tiny_sd3.read_caption import read_caption
from emag_export.tiny_sd3.scenes import Item, Scene, draw, placed

__all__ = ["ANY", "Truth", "drawing_of", "require_scenes", "truth_of"]

ANY = "any"
"""Colour of a background, or size of an object, that a prompt leaves open."""

Truth = Callable[[str], Scene | None]
"""Prompt to scene; None if it describes none."""


def truth_of(labels: ClassLabels | None) -> Truth:
    """How the prompts of a model are read.

    Args:
        labels: Of the bundle; None where prompts are text.
    """
    if labels is None:
        return read_caption
    known = labels.names == tuple(id2label().values())
    return lambda prompt: _scene_of_class(labels.find(prompt)) if known else None


def _scene_of_class(label: int) -> Scene | None:
    if label >= len(CLASSES):
        return None
    colour, shape = CLASSES[label]
    return Scene(background=ANY, items=(Item(shape=shape, colour=colour, size=ANY),))


def drawing_of(truth: Truth, prompt: str, rng: np.random.Generator) -> Pixels | None:
    """A drawing of what a prompt asks for, at a place and of a size that it allows.

    Args:
        truth: Reads the prompt.
        prompt: Of an embedded model.
        rng: Chooses what the prompt leaves open.

    Returns:
        None if it asks for no scene.
    """
    scene = truth(prompt)
    if scene is None:
        return None
    if scene.background != ANY:
        return draw(placed(scene, rng))
    (item,) = scene.items
    return draw(sample_class_scene(CLASSES.index((item.colour, item.shape)), rng))


def require_scenes(truth: Truth, prompts: Sequence[str]) -> None:
    """Refuse prompts whose pictures could not be measured.

    Raises:
        InputError: Naming the first.
    """
    for prompt in prompts:
        if truth(prompt) is None:
            raise InputError(
                f"{prompt!r} describes no scene of the small models, which `metrics` drawn and accuracy "
                "need; write it like 'a large red circle on a blue background', or choose others"
            )
