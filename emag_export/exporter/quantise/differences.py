"""Send perturbed rows through a linear as their difference to the row that they continue.

EMAG steers along c - p, a few percent of c. Rounding a weight makes the same error in c and p, so that it
cancels; rounding an activation does not, and what is left can be larger than c - p itself. A linear may as
well be given [u, c, p - c]: behind it y_c is added to y of p - c, which is the same function in exact
arithmetic, and now the rounding error of p is that of c and one of the small difference.

``branch_rows`` says which rows continue the same trunk row; of those the first one is subtracted from the
others. So no input is needed, and images in any phase may share a call.
"""

import onnx_ir
from onnx_ir import DataType

from emag_export.exporter.quantise.insert import Inserter, constant

__all__ = ["Differences"]


class Differences:
    """Of one graph.

    A base row is subtracted and added by gathering rows, which TensorRT makes part of its neighbours; or by a
    product with a small matrix over the rows, which takes onnxruntime's CPU provider 1.7 ms where gathering,
    masking and adding take 2.6 (three rows of 589 tokens and 1536 channels).

    Args:
        graph: To change.
        branch_rows: Name of the input.
        behind_fork: Values that have the rows behind the fork.
        as_product: Whether to multiply with a matrix.
    """

    def __init__(
        self,
        graph: onnx_ir.Graph,
        branch_rows: str,
        behind_fork: set[onnx_ir.Value],
        *,
        as_product: bool = False,
    ) -> None:
        self._graph, self._behind_fork, self._as_product = graph, behind_fork, as_product
        self._matrices: dict[str, onnx_ir.Value] = {}
        self._first = graph[0]
        self._inputs: dict[onnx_ir.Value, onnx_ir.Value] = {}
        self._masks: dict[tuple[DataType, int], onnx_ir.Value] = {}
        (rows,) = (value for value in graph.inputs if value.name == branch_rows)
        insert = Inserter(graph, self._first)
        first, second = (constant(graph, f"axis_{axis}", [axis], DataType.INT64) for axis in (0, 1))
        same = insert("Equal", insert("Unsqueeze", rows, first), insert("Unsqueeze", rows, second))
        self._base = insert("ArgMax", insert("Cast", same, to=DataType.FLOAT), axis=1, keepdims=0)
        zero, one = (constant(graph, f"number_{number}", number, DataType.INT64) for number in (0, 1))
        self._count = insert("Shape", rows)
        self._flat: onnx_ir.Value | None = None
        own = insert("Range", zero, insert("Squeeze", self._count), one)
        self._own = own
        self._differs = insert("Not", insert("Equal", self._base, own))

    def apply_to(self, value: onnx_ir.Value) -> bool:
        """Whether the value has rows of which some continue others."""
        return value in self._behind_fork

    def taken(self, value: onnx_ir.Value, insert: Inserter) -> onnx_ir.Value:
        """The input of a linear, with differences in place of the rows that continue another one."""
        if value not in self._inputs and self._as_product:
            taken = self._product("Sub", value, value, insert)
            taken.shape, taken.dtype = value.shape, value.dtype
            self._inputs[value] = taken
        elif value not in self._inputs:
            base = insert("Mul", insert("Gather", value, self._base, axis=0), self._mask(value))
            self._inputs[value] = insert.like(value, "Sub", value, base)
        return self._inputs[value]

    def put_back(self, result: onnx_ir.Value, like: onnx_ir.Value, insert: Inserter) -> onnx_ir.Value:
        """The output of the linear without its bias, whole again.

        Args:
            result: Of the product.
            like: A value with its shape and type.
            insert: In front of what uses it.
        """
        if self._as_product:
            return self._product("Add", result, like, insert)
        base = insert("Mul", insert("Gather", result, self._base, axis=0), self._mask(like))
        return insert("Add", result, base)

    def _product(
        self, sign: str, value: onnx_ir.Value, like: onnx_ir.Value, insert: Inserter
    ) -> onnx_ir.Value:
        """Rows with their base row added, or subtracted; tokens and channels are one axis meanwhile.

        Args:
            sign: ``Add`` or ``Sub``.
            value: [rows, tokens, channels], or the first two as one axis.
            like: A value with the type and the channels of the result.
            insert: Where.
        """
        assert like.shape is not None and isinstance(like.shape[-1], int), "channels are known"
        channels = like.shape[-1]
        whole = constant(insert.graph, f"rows_of_{channels}", [0, -1, channels], DataType.INT64)
        if self._flat is None:
            rest = constant(self._graph, "rest", [-1], DataType.INT64)
            self._flat = Inserter(self._graph, self._first)("Concat", self._count, rest, axis=0)
        rows = insert("Reshape", value, self._flat)
        return insert("Reshape", insert("MatMul", self._matrix(sign, like), rows), whole)

    def _matrix(self, sign: str, like: onnx_ir.Value) -> onnx_ir.Value:
        """The unit matrix, plus or minus a one where a row continues another."""
        if sign not in self._matrices:
            assert like.dtype is not None, "linears are found by their shapes"
            insert = Inserter(self._graph, self._first)
            column, row = (constant(self._graph, f"axis_{axis}", [axis], DataType.INT64) for axis in (1, 0))
            numbers = insert("Unsqueeze", self._own, row)
            unit, base = (
                insert("Cast", insert("Equal", insert("Unsqueeze", rows, column), numbers), to=like.dtype)
                for rows in (self._own, self._base)
            )
            differs = insert("Unsqueeze", insert("Cast", self._differs, to=like.dtype), column)
            self._matrices[sign] = insert(sign, unit, insert("Mul", base, differs))
        return self._matrices[sign]

    def _mask(self, value: onnx_ir.Value) -> onnx_ir.Value:
        """1 for rows that are differences, 0 for the others, with as many axes as the value."""
        assert value.dtype is not None and value.shape is not None, "linears are found by their shapes"
        dtype, axes = value.dtype, len(value.shape)
        if (dtype, axes) not in self._masks:
            insert = Inserter(self._graph, self._first)
            shape = constant(self._graph, f"column_{axes}", [-1, *[1] * (axes - 1)], DataType.INT64)
            column = insert("Reshape", insert("Cast", self._differs, to=dtype), shape)
            self._masks[dtype, axes] = column
        return self._masks[dtype, axes]
