"""Round an activation to FP8 and back, where its range is known."""

import math

import onnx_ir
from onnx_ir import DataType

from emag_export.exporter.quantise.insert import Inserter, constant
from emag_export.exporter.quantise.rounding import FORMATS

__all__ = ["in_fp8"]


def in_fp8(insert: Inserter, value: onnx_ir.Value, largest: float, dtype: DataType) -> onnx_ir.Value:
    """A tensor rounded to FP8 and back.

    The scale is the nearest power of two: it loses nothing of a float, and many layers have the same one, so
    that a compiler need not make kernels for each of them.

    Args:
        insert: Where.
        value: The tensor.
        largest: What the largest number of the format stands for, to a factor of the root of two.
        dtype: Of the tensor.
    """
    power = round(math.log2(largest / FORMATS["fp8"].largest))
    scale = constant(insert.graph, f"fp8_scale_{power}", 2.0**power, dtype)
    zero = constant(insert.graph, "fp8_zero", 0, DataType.FLOAT8E4M3FN)
    return insert.like(value, "DequantizeLinear", insert("QuantizeLinear", value, scale, zero), scale, zero)
