"""Captions of a scene: the plain one, and varied ones with synonyms for training; numpy only."""

from __future__ import annotations

import numpy as np

from emag_export.tiny_sd3.palette import COLOURS
from emag_export.tiny_sd3.scenes import RELATIONS, SHAPES, SIZES, Item, Scene

SYNONYMS: dict[str, tuple[str, ...]] = {
    "large": ("big", "huge"),
    "small": ("little", "tiny"),
    "purple": ("violet",),
    "circle": ("disc",),
    "cross": ("plus",),
    "ring": ("hoop",),
    "background": ("backdrop",),
    "below": ("under",),
    "above": ("over",),
}
"""Words that mean the same in a caption; training uses one of them in every sixth place."""

PREFIXES: tuple[str, ...] = ("a photo of", "a picture of", "a drawing of", "an image of")

_RELATION_TEXT = {
    "left of": "to the left of",
    "right of": "to the right of",
    "above": "above",
    "below": "below",
}


def caption(scene: Scene) -> str:
    """Write the plain caption, which names every attribute the checker looks at.

    Args:
        scene: One or two objects.

    Returns:
        For example ``a large red circle on a blue background``, 18 words at most.
    """
    first = _item_text(scene.items[0])
    ground = f"a{_n(scene.background)} {scene.background} background"
    if len(scene.items) == 1:
        return f"{first} at the {scene.position} of {ground}" if scene.position else f"{first} on {ground}"
    if scene.relation is None:
        return f"{first} and {_item_text(scene.items[1])} on {ground}"
    return f"{first} {_RELATION_TEXT[scene.relation]} {_item_text(scene.items[1])} on {ground}"


def varied_caption(scene: Scene, rng: np.random.Generator) -> str:
    """Write a caption in one of many styles: synonyms, a prefix, a shorter relation, or less said.

    Args:
        scene: One or two objects.
        rng: Source of the choices.

    Returns:
        A caption of 18 words at most. It never says anything false, but one in ten leaves something out.
    """
    text = caption(scene)
    if rng.random() < 0.35:
        text = text.replace("to the left of", "left of").replace("to the right of", "right of")
    if rng.random() < 0.1:
        text = _say_less(scene, text, rng)
    words = [_synonym(word, rng) for word in text.split()]
    text = _fix_articles(" ".join(words))
    if rng.random() < 0.35 and len(words) <= 15:
        text = f"{rng.choice(PREFIXES)} {text}"
    return text


def vocabulary() -> tuple[str, ...]:
    """List every word a caption can have, in alphabetical order."""
    words = {"a", "an", "at", "of", "on", "and", "to", "the", "top", "bottom", "background"}
    words.update(COLOURS, SHAPES, SIZES)
    for phrase in (*RELATIONS, *PREFIXES, *SYNONYMS):
        words.update(phrase.split())
    for others in SYNONYMS.values():
        words.update(others)
    return tuple(sorted(words))


def _item_text(item: Item) -> str:
    return f"a {item.size} {item.colour} {item.shape}"


def _n(word: str) -> str:
    return "n" if word[0] in "aeiou" else ""


def _say_less(scene: Scene, text: str, rng: np.random.Generator) -> str:
    choice = rng.integers(3)
    if choice == 0:
        return text.replace("large ", "").replace("small ", "")
    if choice == 1:
        return text.replace(f" on a{_n(scene.background)} {scene.background} background", "")
    return text.replace(" background", "").replace(f"on a{_n(scene.background)} ", "on ")


def _synonym(word: str, rng: np.random.Generator) -> str:
    others = SYNONYMS.get(word, ())
    return str(rng.choice(others)) if others and rng.random() < 1 / 6 else word


def _fix_articles(text: str) -> str:
    words = text.split()
    for place, following in enumerate(words[1:]):
        if words[place] in ("a", "an"):
            words[place] = f"a{_n(following)}"
    return " ".join(words)
