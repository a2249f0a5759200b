"""Round activations to eight-bit integers, every token with the range that it has, and multiply them so."""

from dataclasses import dataclass

import onnx_ir
from onnx_ir import DataType

from emag_export.exporter.quantise.insert import Inserter, constant
from emag_export.exporter.quantise.rounding import FORMATS

__all__ = ["RoundedTokens", "Tokens"]

_MIDDLE = 128
"""What zero becomes: onnxruntime multiplies unsigned activations and signed weights fastest."""


@dataclass(frozen=True, kw_only=True)
class RoundedTokens:
    """Activations of some rows, all their tokens behind each other."""

    numbers: onnx_ir.Value
    """uint8, [tokens, channels]."""
    step: onnx_ir.Value
    """What one stands for, [tokens]."""
    middle: onnx_ir.Value


class Tokens:
    """Of one graph.

    Args:
        dtype: Of its activations.
        least: Range of a token that is zero throughout.
    """

    def __init__(self, dtype: DataType, least: float) -> None:
        self._dtype, self._least = dtype, least
        self._rounded: dict[onnx_ir.Value, RoundedTokens] = {}
        self._shapes: dict[tuple[onnx_ir.Value, int], onnx_ir.Value] = {}

    def rounded(self, data: onnx_ir.Value, insert: Inserter) -> RoundedTokens:
        """The input of a linear in eight bits; once, however many linears it goes into.

        Args:
            data: [rows, channels], or with tokens between the two.
            insert: In front of the first linear.
        """
        if data not in self._rounded:
            self._rounded[data] = self._round(data, insert)
        return self._rounded[data]

    def _round(self, data: onnx_ir.Value, insert: Inserter) -> RoundedTokens:
        assert data.shape is not None and isinstance(data.shape[-1], int), "channels are known"
        graph, channels = insert.graph, data.shape[-1]
        flat = data
        if len(data.shape) > 2:
            shape = constant(graph, f"tokens_{channels}", [-1, channels], DataType.INT64)
            flat = insert("Reshape", data, shape)
        last = constant(graph, "last_axis", [-1], DataType.INT64)
        above, below = (insert(f"Reduce{end}", flat, last, keepdims=0) for end in ("Max", "Min"))
        least = constant(graph, "least_range", self._least, self._dtype)
        largest = insert("Max", above, insert("Neg", below), least)
        unit = constant(graph, "int8_step", 1 / FORMATS["int8"].largest, self._dtype)
        step = insert("Mul", largest, unit)
        middle = constant(graph, "uint8_middle", _MIDDLE, DataType.UINT8)
        middles = insert("Expand", middle, insert("Shape", step))
        numbers = insert("QuantizeLinear", flat, step, middles, axis=0)
        return RoundedTokens(numbers=numbers, step=step, middle=middle)

    def multiplied(
        self, tokens: RoundedTokens, weight: onnx_ir.Value, scales: onnx_ir.Value, insert: Inserter
    ) -> onnx_ir.Value:
        """Their product with a weight, [tokens, outputs], in the graph's precision.

        Args:
            tokens: Of the input.
            weight: int8, [channels, outputs].
            scales: Of the outputs.
            insert: Where.
        """
        product = insert("MatMulInteger", tokens.numbers, weight, tokens.middle)
        wide = insert("Mul", insert("Cast", product, to=self._dtype), scales)
        column = constant(insert.graph, "axis_1", [1], DataType.INT64)
        return insert("Mul", wide, insert("Unsqueeze", tokens.step, column))

    def with_rows(
        self, result: onnx_ir.Value, data: onnx_ir.Value, outputs: int, insert: Inserter
    ) -> onnx_ir.Value:
        """[rows, tokens, outputs] of [rows * tokens, outputs].

        Args:
            result: Of :meth:`multiplied`.
            data: The linear's input, which has as many rows and tokens.
            outputs: Of the linear.
            insert: Where.
        """
        if (data, outputs) not in self._shapes:
            count = constant(insert.graph, f"outputs_{outputs}", [outputs], DataType.INT64)
            sides = insert("Shape", data, start=0, end=2)
            self._shapes[data, outputs] = insert("Concat", sides, count, axis=0)
        return insert("Reshape", result, self._shapes[data, outputs])
