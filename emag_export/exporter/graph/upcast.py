"""A float32 copy of a bfloat16 graph, with the same weights: onnxruntime can run it on a CPU."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir
from onnx_ir import DataType

from emag_export.contract import GraphSpec

__all__ = ["upcast_graph", "upcast_spec"]


def upcast_graph(graph: Path, copy: Path) -> None:
    """Write a graph in which every bfloat16 tensor is float32.

    Weights are the rounded ones, arithmetic is float32: the copy differs from the graph by rounding of
    results alone. Every weight is in memory twice meanwhile.

    Args:
        graph: ONNX file with its external data beside it.
        copy: Where to; its weights go to ``<name>.data`` beside it.
    """
    model = onnx_ir.load(graph)
    for value in model.graph.initializers.values():
        if value.const_value is not None and value.const_value.dtype == DataType.BFLOAT16:
            wide = value.const_value.numpy().astype(np.float32)
            value.const_value = onnx_ir.tensor(wide, name=value.name)
        _widen(value)
    for value in model.graph.inputs:
        _widen(value)
    for node in model.graph.all_nodes():
        for name, attribute in list(node.attributes.items()):
            if attribute.type == onnx_ir.AttributeType.INT and _is_cast_to_bfloat16(node, name, attribute):
                node.attributes[name] = onnx_ir.AttrInt64(name, int(DataType.FLOAT))
            elif (
                attribute.type == onnx_ir.AttributeType.TENSOR and attribute.value.dtype == DataType.BFLOAT16
            ):
                wide = attribute.value.numpy().astype(np.float32)
                node.attributes[name] = onnx_ir.AttrTensor(name, onnx_ir.tensor(wide))
        for value in node.outputs:
            _widen(value)
    onnx_ir.save(model, copy, external_data=f"{copy.name}.data")


def _widen(value: onnx_ir.Value) -> None:
    if value.dtype == DataType.BFLOAT16:
        value.dtype = DataType.FLOAT


def _is_cast_to_bfloat16(node: onnx_ir.Node, name: str, attribute: onnx_ir.Attr) -> bool:
    return node.op_type == "Cast" and name == "to" and attribute.value == int(DataType.BFLOAT16)


def upcast_spec(spec: GraphSpec) -> GraphSpec:
    """The contract of the copy."""

    def wide(dtype: str) -> str:
        return "float32" if dtype == "bfloat16" else dtype

    return replace(
        spec,
        inputs=tuple(replace(tensor, dtype=wide(tensor.dtype)) for tensor in spec.inputs),
        outputs=tuple(replace(tensor, dtype=wide(tensor.dtype)) for tensor in spec.outputs),
    )
