"""One denoising step: the runtime around one engine call, with the graph's inputs and outputs by name."""

from collections.abc import Iterator, Sequence
from xml.etree.ElementTree import Element

from benchmarks.figures.subject import sd3
from benchmarks.figures.svg import Palette, Point, arrow, box, drawing, label
from emag_export.contract import STATE_PAIRS, DenoiserContract, TensorSpec
from emag_export.engines.registry import BACKENDS

__all__ = ["architecture"]

_GRAPH: Point = (372, 58)
_GRAPH_SIZE: Point = (196, 322)
_LINE = 31
"""Between two tensors."""


def architecture(palette: Palette) -> Element:
    """The forked graph of SD3-medium, what is fed to it, and who does what between two calls."""
    contract = sd3().contract
    names = ", ".join(spec.name for spec in contract.graph.inputs)
    outputs = ", ".join(spec.name for spec in contract.graph.outputs)
    said = f"One step: an engine runs one graph with the inputs {names} and the outputs {outputs}"
    return drawing(920, 500, said, _elements(palette, contract))


def _elements(palette: Palette, contract: DenoiserContract) -> Iterator[Element]:
    yield label((10, 24), "One step is one engine call", palette.ink, size=15, style="bold")
    yield label((910, 24), f"{', '.join(BACKENDS)}", palette.faint, anchor="end", style="code")
    yield box(_GRAPH, _GRAPH_SIZE, fill=palette.panel, line=palette.line)
    (left, top), width = _GRAPH, _GRAPH_SIZE[0]
    yield label(
        (left + width / 2, top - 10), "transformer/model.onnx", palette.faint, anchor="middle", style="code"
    )
    yield from _sections(palette, contract)
    yield from _tensors(palette, contract.graph.inputs, 12, left)
    yield from _tensors(palette, contract.graph.outputs, left + width + 30, left + width)
    yield from _runtime(palette, contract)


def _sections(palette: Palette, contract: DenoiserContract) -> Iterator[Element]:
    """Trunk, gather, branch: boxes from top to bottom."""
    left, top = _GRAPH[0] + 16, _GRAPH[1] + 14
    first, last = contract.blocks[0], contract.blocks[-1]
    parts = (
        ("trunk rows", "u  c", f"blocks 0–{first - 1}", palette.cond),
        ("branch rows", "u  c  p", f"candidates {first}–{last}", palette.perturbed),
        ("branch rows", "u  c  p", f"blocks {last + 1}–{contract.num_blocks - 1}", palette.cond),
    )
    for number, (rows, drawn, blocks, colour) in enumerate(parts):
        y = top + number * 101
        yield box((left, y), (164, 76), line=colour)
        yield label((left + 12, y + 23), blocks, palette.ink, style="bold")
        yield label((left + 12, y + 43), rows, palette.faint, size=12)
        yield label((left + 12, y + 63), drawn, colour, style="code")
        if number < len(parts) - 1:
            yield from arrow([(left + 82, y + 77), (left + 82, y + 100)], palette.line)
    yield label((left + 90, top + 93), "gather", palette.faint, size=11.5)


def _tensors(palette: Palette, specs: Sequence[TensorSpec], left: float, edge: float) -> Iterator[Element]:
    """Names and shapes, each with an arrow to or from the graph."""
    inward = left < edge
    for number, spec in enumerate(specs):
        y = _GRAPH[1] + 16 + number * _LINE
        kept = spec.name in {*STATE_PAIRS, *STATE_PAIRS.values()}
        colour = palette.perturbed if kept or spec.name.startswith("layer") else palette.ink
        yield label((left, y), spec.name, colour, size=12.5, style="code")
        dims = " × ".join(str(dim).replace("*", "·") for dim in spec.dims)
        yield label((left, y + 13), dims, palette.faint, size=10.5)
        ends = [(edge - 34, y - 3), (edge - 2, y - 3)] if inward else [(edge + 2, y - 3), (edge + 24, y - 3)]
        yield from arrow(ends, palette.line)


def _runtime(palette: Palette, contract: DenoiserContract) -> Iterator[Element]:
    """What is done between two calls, below the graph."""
    top = 412
    parts = (
        ("plan", "phase, rows, time, a", "of every image", 12),
        ("choose", "λ = argmax of the", "Δ before", 222),
        ("guide", "u, c, p → one", "prediction", 502),
        ("sample", "x' = a x + b·prediction", "swap E buffers", 712),
    )
    for name, first, second, x in parts:
        yield box((x, top), (196, 76), fill=palette.panel, line=palette.line)
        yield label((x + 12, top + 24), name, palette.ink, size=14, style="bold")
        yield label((x + 12, top + 45), first, palette.faint, size=12)
        yield label((x + 12, top + 62), second, palette.faint, size=12)
    yield label((460, top + 44), "runtime/", palette.faint, size=12, anchor="middle", style="code")
    middle = 398
    yield from arrow([(110, top), (110, middle - 22)], palette.line)
    yield from arrow([(320, top), (320, middle - 22)], palette.perturbed)
    yield from arrow([(610, middle - 100), (610, top)], palette.line)
    yield from arrow([(810, middle - 100), (810, top)], palette.line)
