"""Does a picture show its class? The checker of tiny-sd3, asked for one object of any size anywhere."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from emag_export.tiny_dit.classes import CLASSES
from emag_export.tiny_sd3.checker import Picture, background_of, check
from emag_export.tiny_sd3.scenes import Item, Scene


@dataclass(frozen=True, kw_only=True)
class ClassVerdict:
    """What is right about one picture.

    Attributes:
        colour: There is an object of the class's colour.
        shape: That object overlaps best, and enough, with the class's shape.
        alone: Nothing else is in the picture.
    """

    colour: bool
    shape: bool
    alone: bool

    @property
    def right(self) -> bool:
        """Whether everything is right."""
        return self.colour and self.shape and self.alone


def check_class(image: Picture, label: int) -> ClassVerdict:
    """Compare a picture with its class.

    Args:
        image: sRGB, 0 to 255, as :func:`emag_export.tiny_sd3.checker.check` takes it.
        label: Class it should show.

    Returns:
        The verdict; the background may have any colour but the object's.
    """
    colour, shape = CLASSES[label]
    item = Item(shape=shape, colour=colour, size="any")
    verdict = check(image, Scene(background=background_of(image), items=(item,)))
    return ClassVerdict(colour=verdict.colour, shape=verdict.shape, alone=verdict.alone)


def class_accuracy(verdicts: Iterable[ClassVerdict]) -> dict[str, float]:
    """Average verdicts.

    Args:
        verdicts: One per picture, at least one.

    Returns:
        Share of pictures right in everything under ``right``, and in each attribute, 0 to 1.
    """
    rows = list(verdicts)
    names = ("right", "colour", "shape", "alone")
    return {name: sum(getattr(row, name) for row in rows) / len(rows) for name in names}
