"""The scene that a caption describes: the inverse of :func:`emag_export.tiny_sd3.captions.caption`."""

from __future__ import annotations

import re

from emag_export.tiny_sd3.captions import PREFIXES, SYNONYMS
from emag_export.tiny_sd3.palette import COLOURS
from emag_export.tiny_sd3.scenes import POSITIONS, RELATIONS, SHAPES, SIZES, Item, Scene

__all__ = ["read_caption"]

_PLAIN = {other: word for word, others in SYNONYMS.items() for other in others}
_ITEM = rf"an? ({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_GROUND = rf"an? ({'|'.join(COLOURS)}) background"
_SINGLE = re.compile(rf"{_ITEM} (?:on|at the ({'|'.join(POSITIONS)}) of) {_GROUND}")
_PAIR = re.compile(rf"{_ITEM} ({'|'.join(RELATIONS)}|and) {_ITEM} on {_GROUND}")


def read_caption(text: str) -> Scene | None:
    """Read a caption, with synonyms and prefixes as in training.

    Args:
        text: For example ``a large red circle on a blue background``.

    Returns:
        The scene without places and radii, which no caption gives; None if the text is no caption, leaves
            something out, or names a colour twice, so that nothing could be measured.
    """
    words = " ".join(_PLAIN.get(word, word) for word in text.casefold().rstrip(". ").split())
    for prefix in PREFIXES:
        words = words.removeprefix(f"{prefix} ")
    words = words.replace("to the left of", "left of").replace("to the right of", "right of")
    if match := _SINGLE.fullmatch(words):
        size, colour, shape, position, ground = match.groups()
        scene = Scene(background=ground, items=(_item(size, colour, shape),), position=position)
    elif match := _PAIR.fullmatch(words):
        first, relation, second, ground = match.groups()[:3], match[4], match.groups()[4:7], match[8]
        items = (_item(*first), _item(*second))
        scene = Scene(background=ground, items=items, relation=None if relation == "and" else relation)
    else:
        return None
    colours = [scene.background, *(item.colour for item in scene.items)]
    return scene if len(set(colours)) == len(colours) else None


def _item(size: str, colour: str, shape: str) -> Item:
    return Item(shape=shape, colour=colour, size=size)
