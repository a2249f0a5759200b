"""Round an activation to FP8 and back, where its range is known."""

import onnx_ir
from onnx_ir import DataType

from emag_export.exporter.quantise.insert import Inserter, constant
from emag_export.exporter.quantise.rounding import FORMATS

__all__ = ["in_fp8"]


def in_fp8(insert: Inserter, value: onnx_ir.Value, largest: float, dtype: DataType) -> onnx_ir.Value:
    """A tensor rounded to FP8 and back.

    Args:
        insert: Where.
        value: The tensor.
        largest: What the largest number of the format stands for.
        dtype: Of the tensor.
    """
    scale = constant(insert.graph, f"fp8_{largest:.9g}", largest / FORMATS["fp8"].largest, dtype)
    zero = constant(insert.graph, "fp8_zero", 0, DataType.FLOAT8E4M3FN)
    return insert.like(value, "DequantizeLinear", insert("QuantizeLinear", value, scale, zero), scale, zero)
