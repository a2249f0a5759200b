"""How averages travel: two buffers that take turns, and the choice that follows one step later."""

from collections.abc import Iterator
from xml.etree.ElementTree import Element

from benchmarks.figures.svg import Palette, arrow, box, drawing, label

__all__ = ["state_turns"]

_STEP = 236
_CALLS = 3
_STEPS = ("i - 1", "i", "i + 1", "i + 2")
"""The averages before the first call, and after each."""


def state_turns(palette: Palette) -> Element:
    """Three calls in a row: which buffer is read, which is written, and where Delta goes."""
    said = (
        "Three calls: each reads the averages in one buffer and writes them into the other; "
        "the distance it finds chooses the block of the next call"
    )
    return drawing(760, 296, said, _elements(palette))


def _elements(palette: Palette) -> Iterator[Element]:
    yield label((10, 66), "buffer A", palette.faint, size=12)
    yield label((10, 256), "buffer B", palette.faint, size=12)
    for call in range(_CALLS):
        left = 86 + call * _STEP
        reads_a = call % 2 == 0
        read, write = (66, 256) if reads_a else (256, 66)
        yield box((left + 20, 108), (128, 92), fill=palette.panel, line=palette.line)
        yield label(
            (left + 84, 138),
            f"call {_STEPS[call + 1]}",
            palette.ink,
            anchor="middle",
            style="bold",
        )
        yield label((left + 84, 162), "E + a (X - E)", palette.faint, size=12, anchor="middle")
        yield label((left + 84, 184), "Δ = mean |E - X|", palette.faint, size=12, anchor="middle")
        yield from _buffer(palette, (left + 20, read - 22), f"E of step {_STEPS[call]}", full=True)
        yield from _buffer(palette, (left + 20, write - 22), f"E of step {_STEPS[call + 1]}", full=False)
        into = (read + 14, 106) if reads_a else (read - 24, 202)
        out = (202, write - 24) if reads_a else (106, write + 14)
        yield from arrow([(left + 60, into[0]), (left + 60, into[1])], palette.cond)
        yield from arrow([(left + 108, out[0]), (left + 108, out[1])], palette.perturbed)
        if call < _CALLS - 1:
            yield from arrow([(left + 149, 154), (left + 254, 154)], palette.perturbed, dashed=True)
            yield label((left + 202, 146), "Δ chooses λ", palette.faint, size=11.5, anchor="middle")


def _buffer(palette: Palette, corner: tuple[float, float], text: str, *, full: bool) -> Iterator[Element]:
    colour = palette.cond if full else palette.perturbed
    yield box(corner, (128, 34), line=colour, dashed=not full)
    what = "ema_state" if full else "ema_state_out"
    yield label((corner[0] + 64, corner[1] + 14), what, palette.ink, size=11.5, anchor="middle", style="code")
    yield label((corner[0] + 64, corner[1] + 28), text, palette.faint, size=11, anchor="middle")
