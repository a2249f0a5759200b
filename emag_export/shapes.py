"""Named dimensions: what a tensor's shape is called, and how a call's sizes follow from its tensors.

A dimension is an integer, a name, or a small expression of names: ``"2*h"``, ``"h*w"``,
``"h*w+text"``. Expressions are sums of products, which is all that a patchified image and a joint
attention row need, and they are what ONNX shows as the name of a dynamic axis.
"""

from collections.abc import Iterable, Mapping
from math import prod

from emag_export.errors import ContractError

__all__ = ["Dim", "Sizes", "evaluate", "product", "solve", "symbols", "without"]

Dim = int | str
"""One axis: a fixed size, or an expression over named sizes."""

Sizes = Mapping[str, int]
"""The size of every named dimension in one call."""


def _terms(dim: Dim) -> list[tuple[int, tuple[str, ...]]]:
    """Split ``"2*h+text"`` into ``[(2, ("h",)), (1, ("text",))]``."""
    terms = []
    for term in str(dim).split("+"):
        factors = term.split("*")
        if not all(factor.isdecimal() or factor.isidentifier() for factor in factors):
            raise ContractError(
                f"{dim!r} is no dimension; it must be a number, a name, or sums of products of them"
            )
        numbers = [int(factor) for factor in factors if factor.isdecimal()]
        names = tuple(factor for factor in factors if not factor.isdecimal())
        terms.append((prod(numbers), names))
    return terms


def symbols(dims: Iterable[Dim]) -> tuple[str, ...]:
    """Names used in ``dims``, in order of first appearance.

    Args:
        dims: Of one tensor or of several.
    """
    return tuple(dict.fromkeys(name for dim in dims for _, names in _terms(dim) for name in names))


def evaluate(dims: Iterable[Dim], sizes: Sizes) -> tuple[int, ...]:
    """The concrete shape of ``dims`` under ``sizes``.

    Args:
        dims: Of one tensor.
        sizes: Of the names in them, at least.
    """
    return tuple(sum(number * prod(sizes[n] for n in names) for number, names in _terms(dim)) for dim in dims)


def product(dims: Iterable[Dim]) -> Dim:
    """How many elements axes of these sizes hold: ``("h", "w")`` is ``"h*w"``, ``(16, 16)`` is 256.

    Args:
        dims: Numbers and single names.
    """
    factors = list(dims)
    number = prod(factor for factor in factors if isinstance(factor, int))
    names = [factor for factor in factors if isinstance(factor, str)]
    return "*".join([*([str(number)] if number != 1 else []), *names]) if names else number


def without(dim: Dim, summand: Dim) -> Dim | None:
    """What is left of a sum: ``"h*w+text"`` without ``"h*w"`` is ``"text"``; None where nothing is left.

    Args:
        dim: The sum.
        summand: As it is written there.
    """
    rest = [term for term in str(dim).split("+") if term != str(summand)]
    return "+".join(rest) or None


def solve(dims: Mapping[str, tuple[Dim, ...]], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Find the size of every named dimension from the shapes of the tensors that carry it.

    Args:
        dims: Tensor name to its dimensions.
        shapes: Tensor name to its actual shape.

    Returns:
        Name of dimension to its size.

    Raises:
        ContractError: If a tensor has the wrong rank, a size cannot be divided as its expression
            asks, or two tensors disagree.
    """
    sizes: dict[str, int] = {}
    origin: dict[str, str] = {}
    axes = []
    for tensor, expected in dims.items():
        shape = shapes[tensor]
        if len(shape) != len(expected):
            raise ContractError(
                f"{tensor} has shape {list(shape)}, expected {len(expected)} dimensions "
                f"[{', '.join(map(str, expected))}]"
            )
        axes += [
            (tensor, axis, dim, size) for axis, (dim, size) in enumerate(zip(expected, shape, strict=True))
        ]
    for tensor, axis, dim, size in axes:
        (number, names), *more = _terms(dim)
        if more or len(names) != 1 or names[0] in sizes:
            continue
        if size % number:
            raise ContractError(
                f"{tensor} has size {size} along axis {axis}; it must be a multiple of {number}"
            )
        sizes[names[0]] = size // number
        origin[names[0]] = tensor
    for tensor, axis, dim, size in axes:
        (wanted,) = evaluate([dim], sizes)
        if wanted != size:
            sources = ", ".join(f"{name}={sizes[name]} from {origin[name]}" for name in symbols([dim]))
            raise ContractError(
                f"{tensor} has size {size} along axis {axis}, expected {dim}"
                + (f" = {wanted} ({sources})" if sources else " as exported")
            )
    return sizes
