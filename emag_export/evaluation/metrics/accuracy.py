"""Prompt accuracy: whether the rule-based checker finds every attribute of the prompt right, yes or no."""

from dataclasses import fields

from emag_export.evaluation.metrics.protocol import Column, Pixels, Scores
from emag_export.evaluation.truth import ANY, Truth
from emag_export.tiny_dit.checker import ClassVerdict, check_class
from emag_export.tiny_dit.classes import CLASSES
from emag_export.tiny_sd3.checker import Verdict, check

__all__ = ["Accuracy"]

_SUMMARIES = {
    "right": "everything below is right",
    "background": "the background has its colour",
    "colour": "every object's colour is there",
    "shape": "every object overlaps best, and enough, with its shape",
    "size": "every object is as large or small as said",
    "place": "every object is where it is said to be",
    "alone": "nothing else is in the picture",
}


class Accuracy:
    """Share of pictures that are right, in all attributes and in each.

    Args:
        truth: Reads prompts.
        classes: Prompts are classes, which leave background, size and place open.
    """

    name = "accuracy"

    def __init__(self, truth: Truth, *, classes: bool) -> None:
        self._truth = truth
        names = ["right", *(field.name for field in fields(ClassVerdict if classes else Verdict))]
        self.columns = tuple(
            Column(name=name, better="higher", tested=name == "right", summary=_SUMMARIES[name])
            for name in names
        )

    def key(self) -> str:
        """Changes with the checker."""
        return "accuracy-1"

    def score(self, prompt: str, pixels: Pixels) -> Scores:
        """1 where an attribute is right, 0 where it is not."""
        scene = self._truth(prompt)
        if scene is None:
            return {column.name: None for column in self.columns}
        verdict: Verdict | ClassVerdict
        if scene.background == ANY:
            (item,) = scene.items
            verdict = check_class(pixels, CLASSES.index((item.colour, item.shape)))
        else:
            verdict = check(pixels, scene)
        return {column.name: float(getattr(verdict, column.name)) for column in self.columns}
