"""What guidance costs: bars of what is counted beside bars of what was measured."""

from collections.abc import Iterator
from typing import Any
from xml.etree.ElementTree import Element

from benchmarks.figures.subject import sd3
from benchmarks.figures.svg import Palette, box, cell, drawing, label
from benchmarks.results import FOLDER, load_results

__all__ = ["cost_bars"]

_MEASURED = FOLDER / "bench" / "amd-epyc.json"
_UNIT = 200
"""Width of 1.00, the cost of CFG."""
_LEFT = 215


def cost_bars(palette: Palette) -> Element:
    """CFG, ours and the released algorithm, relative to CFG."""
    return drawing(
        760,
        236,
        "Cost of a run relative to classifier-free guidance, counted and measured: " + _said(),
        _elements(palette),
    )


def _said() -> str:
    return "; ".join(
        f"{name} counted {counted:.2f}, measured {measured:.2f}" for name, _, counted, measured in _bars()
    )


def _bars() -> Iterator[tuple[str, str, float, float]]:
    """Name, what it is, counted and measured, each relative to CFG on the same engine."""
    rows = load_results(_MEASURED)["reports"]["256 px"]["results"]
    ours, released = _row(rows, "emag-q"), _row(rows, "two-pass emag-q")
    counted = sd3().cost
    yield "CFG", "no hard negative", 1.0, 1.0
    yield (
        "EMAG, emag-export",
        "one forked graph, onnxruntime",
        counted.relative_to_cfg,
        ours["to_cfg"]["ratio"],
    )
    yield (
        "EMAG, released code",
        "two passes, PyTorch",
        counted.two_pass / counted.cfg,
        released["to_cfg"]["ratio"],
    )


def _row(rows: list[dict[str, Any]], method: str) -> dict[str, Any]:
    return next(row for row in rows if row["method"] == method)


def _elements(palette: Palette) -> Iterator[Element]:
    yield label((10, 22), "Cost of 28 steps, CFG = 1", palette.ink, size=15, style="bold")
    yield box((_LEFT + 250, 10), (14, 14), line=palette.ink)
    yield label((_LEFT + 270, 22), "counted, in row-blocks", palette.faint)
    yield cell((_LEFT + 425, 10), (14, 14), fill=palette.ink)
    yield label((_LEFT + 445, 22), "measured", palette.faint)
    colours = (palette.uncond, palette.cond, palette.perturbed)
    for number, ((name, what, counted, measured), colour) in enumerate(zip(_bars(), colours, strict=True)):
        top = 46 + 56 * number
        yield label((_LEFT - 14, top + 17), name, palette.ink, size=14, anchor="end", style="bold")
        yield label((_LEFT - 14, top + 35), what, palette.faint, size=12, anchor="end")
        yield box((_LEFT, top), (_UNIT * counted, 19), line=colour)
        yield cell((_LEFT, top + 22), (_UNIT * measured, 19), fill=colour)
        yield label((_LEFT + _UNIT * counted + 8, top + 14), f"{counted:.2f}", palette.faint)
        yield label(
            (_LEFT + _UNIT * measured + 8, top + 36), f"{measured:.2f}", palette.ink, size=14, style="bold"
        )
    machine = load_results(_MEASURED)["machine"]
    below = (
        f"SD3-medium's 24 blocks at a quarter of their width, random weights, 256 image tokens, "
        f"{machine['processor']}, {machine['cores']} cores."
    )
    yield label((10, 230), below + " No GPU yet.", palette.faint, size=11.5)
