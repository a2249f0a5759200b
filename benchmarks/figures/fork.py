"""The fork: which rows run through which blocks in a guided step, three ways."""

from collections.abc import Iterator
from xml.etree.ElementTree import Element

from benchmarks.figures.subject import sd3
from benchmarks.figures.svg import Palette, arrow, box, cell, drawing, label, title

__all__ = ["fork_grid"]

_SIZE = 20
_LEFT = 130


def fork_grid(palette: Palette) -> Element:
    """A square for every row-block of one guided step: CFG, the released two passes, the fork."""
    contract = sd3().contract
    blocks, fork = contract.num_blocks, contract.fork
    said = (
        f"Row-blocks of a guided step: CFG {2 * blocks}, released code {4 * blocks}, fork {3 * blocks - fork}"
    )
    return drawing(760, 372, said, _elements(palette))


def _elements(palette: Palette) -> Iterator[Element]:
    contract = sd3().contract
    blocks, fork = contract.num_blocks, contract.fork
    u, c, p = (("u", palette.uncond), ("c", palette.cond), ("p", palette.perturbed))
    spare = ("u again, unused", palette.uncond)
    yield from _grid(palette, 30, f"CFG: {2 * blocks} row-blocks", [(*u, 0), (*c, 0)])
    yield from _grid(
        palette,
        116,
        f"EMAG, released code: {4 * blocks} row-blocks in two passes",
        [(*u, 0), (*c, 0), (*spare, 0), (*p, 0)],
    )
    top = 250
    yield from _grid(
        palette,
        top,
        f"EMAG, forked: {3 * blocks - fork} row-blocks in one call",
        [(*u, 0), (*c, 0), (*p, fork)],
    )
    start = _LEFT + fork * _SIZE
    yield from arrow(
        [
            (start - 12, top + 32 + _SIZE / 2 - 10),
            (start - 12, top + 10 + 2.5 * _SIZE),
            (start, top + 10 + 2.5 * _SIZE),
        ],
        palette.perturbed,
    )
    width = len(contract.blocks) * _SIZE
    yield box((start - 1, top + 10 + 2 * _SIZE - 1), (width, _SIZE), line=palette.ink)
    yield label(
        (start + width / 2, top + 10 + 3 * _SIZE + 18),
        "candidates",
        palette.faint,
        size=12,
        anchor="middle",
    )
    for block in (0, fork, contract.blocks[-1], blocks - 1):
        yield label(
            (_LEFT + (block + 0.5) * _SIZE - 1, top + 10 + 3 * _SIZE + 36),
            str(block),
            palette.faint,
            size=12,
            anchor="middle",
        )
    yield label((_LEFT - 12, top + 10 + 3 * _SIZE + 36), "block", palette.faint, size=12, anchor="end")


def _grid(palette: Palette, top: float, name: str, rows: list[tuple[str, str, int]]) -> Iterator[Element]:
    """Rows of squares: name, colour, and the first block it runs through."""
    yield title((_LEFT, top), name, palette)
    for number, (row, colour, first) in enumerate(rows):
        y = top + 10 + number * _SIZE
        yield label((_LEFT - 12, y + 14), row, palette.faint, size=12, anchor="end")
        for block in range(first, sd3().contract.num_blocks):
            faded = 0.35 if "again" in row else 1.0
            yield cell((_LEFT + block * _SIZE, y), (_SIZE - 2, _SIZE - 2), fill=colour, opacity=faded)
