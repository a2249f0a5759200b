"""How many elements a tensor may have on a GPU, and what fits below that.

onnxruntime's CUDA kernels index with 32 bits: from 2^31 elements on, Concat overflows, and with four
pictures of ``emag`` at 1024 pixels it silently wrote a fifth of the averages. TensorRT takes no such tensor.
"""

from math import prod

from emag_export.contract import GraphSpec, TensorSpec
from emag_export.shapes import Sizes, evaluate

__all__ = ["MAX_ELEMENTS", "largest", "what_fits"]

MAX_ELEMENTS = 2**31 - 1
"""Of one tensor."""

_PER_PICTURE = ("trunk_rows", "rows", "tracked")
"""Dimensions of the denoiser that grow with the number of pictures; ``tracked`` is that number."""


def largest(spec: GraphSpec, sizes: Sizes) -> tuple[TensorSpec, int]:
    """The input or output of a graph that has the most elements, averages included, and how many."""
    counts = [(tensor, prod(evaluate(tensor.dims, sizes))) for tensor in (*spec.inputs, *spec.outputs)]
    return max(counts, key=lambda row: row[1])


def what_fits(spec: GraphSpec, sizes: Sizes, *, cell: int = 1, unit: str = "image tokens") -> str:
    """How many pictures fit into one call, or which size does where not even one fits.

    Args:
        spec: Of the graph.
        sizes: Too large.
        cell: Units along a side of an image token.
        unit: In which a side is named.
    """
    for pictures in range(sizes.get("tracked", 1) - 1, 0, -1):
        if largest(spec, _for_pictures(sizes, pictures))[1] <= MAX_ELEMENTS:
            return f"{pictures} picture{'s fit' if pictures > 1 else ' fits'} at this size"
    one = _for_pictures(sizes, 1)
    for side in range(max(sizes.get("h", 1), sizes.get("w", 1)), 0, -1):
        if largest(spec, {**one, "h": side, "w": side})[1] <= MAX_ELEMENTS:
            return f"not even one picture fits at this size, one of {side * cell} x {side * cell} {unit} does"
    return "no picture fits"


def _for_pictures(sizes: Sizes, pictures: int) -> dict[str, int]:
    now = sizes.get("tracked", 1)
    return {
        name: -(-size * pictures // now) if name in _PER_PICTURE else size for name, size in sizes.items()
    }
