"""What each kind of hard negative makes of one attention map of sixteen image tokens."""

import math
import random
from collections.abc import Iterator
from xml.etree.ElementTree import Element

from benchmarks.figures.svg import Palette, cell, drawing, label
from emag_export.kinds import KINDS, Variant

__all__ = ["negative_maps"]

_SIDE = 4
"""Tokens along a side of the grid."""
_CELL = 8
_BETA = 0.7
"""Of the averages here, so that a few steps show them."""

Matrix = list[list[float]]
"""Not numpy: its exponential rounds otherwise on other processors, and the file must have the same bytes."""


def negative_maps(palette: Palette) -> Element:
    """The conditional row's map, and the perturbed row's under every kind; drawn from one toy attention."""
    names = ", ".join(str(variant) for variant in _SHOWN)
    return drawing(760, 222, f"Attention of one head: conditional, {names}", _elements(palette))


_SHOWN = (Variant.EMAG_Q, Variant.EMAG, Variant.IDENTITY, Variant.BLUR_QUERY, Variant.SKIP)


def _elements(palette: Palette) -> Iterator[Element]:
    queries, keys = _toy(steps=6)
    now = _attention(queries[-1], keys)
    maps: dict[str, Matrix | None] = {
        "conditional": now,
        Variant.EMAG_Q: _attention(_average(queries), keys),
        Variant.EMAG: _average([_attention(step, keys) for step in queries]),
        Variant.IDENTITY: [[float(row == column) for column in range(len(now))] for row in range(len(now))],
        Variant.BLUR_QUERY: _attention(_mean(queries[-1]), keys),
        Variant.SKIP: None,
    }
    assert set(maps) <= {"conditional", *KINDS}
    for number, (name, found) in enumerate(maps.items()):
        left = 6 + number * 126
        yield label((left, 18), str(name), palette.ink, style="bold")
        colour = palette.cond if name == "conditional" else palette.perturbed
        if found is None:
            yield label((left, 96), "no attention:", palette.faint, size=12)
            yield label((left, 114), "the block is", palette.faint, size=12)
            yield label((left, 132), "left out", palette.faint, size=12)
            continue
        yield from _matrix(palette, (left, 32), found, colour)
    yield label(
        (6, 194),
        "Rows are queries, columns are keys; a toy attention of 16 tokens over six steps, not a model's.",
        palette.faint,
        size=12,
    )
    yield label(
        (6, 212),
        "emag-i and emag-t average a part of the rows, image to image or image to text.",
        palette.faint,
        size=12,
    )


def _matrix(palette: Palette, corner: tuple[float, float], values: Matrix, colour: str) -> Iterator[Element]:
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            place = (corner[0] + column * _CELL * 0.85, corner[1] + row * _CELL)
            yield cell(
                place,
                (_CELL * 0.85 - 0.6, _CELL - 0.6),
                fill=colour,
                opacity=round(0.06 + 0.93 * value**0.5, 2),
            )


def _toy(steps: int) -> tuple[list[Matrix], Matrix]:
    """Queries of some steps, which settle from noise to the keys' places, and keys."""
    numbers = random.Random(3)
    places = [(row, column) for row in range(_SIDE) for column in range(_SIDE)]
    keys = [[math.cos(row), math.sin(row), math.cos(column), math.sin(column)] for row, column in places]
    noise = [[numbers.gauss(0, 1) for _ in key] for key in keys]
    queries = []
    for step in range(steps):
        share = step / (steps - 1)
        queries.append(
            [
                [2.4 * (share * k + (1 - share) * n) for k, n in zip(key, drawn, strict=True)]
                for key, drawn in zip(keys, noise, strict=True)
            ]
        )
    return queries, keys


def _attention(queries: Matrix, keys: Matrix) -> Matrix:
    rows = []
    for query in queries:
        scores = [math.exp(sum(a * b for a, b in zip(query, key, strict=True))) for key in keys]
        rows.append([score / sum(scores) for score in scores])
    return rows


def _average(steps: list[Matrix]) -> Matrix:
    """Exponential moving average over steps."""
    found = steps[0]
    for step in steps[1:]:
        found = [
            [_BETA * old + (1 - _BETA) * new for old, new in zip(before, after, strict=True)]
            for before, after in zip(found, step, strict=True)
        ]
    return found


def _mean(queries: Matrix) -> Matrix:
    """Every query becomes the mean of all."""
    mean = [sum(column) / len(queries) for column in zip(*queries, strict=True)]
    return [mean for _ in queries]
