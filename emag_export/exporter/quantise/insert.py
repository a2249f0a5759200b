"""Put new nodes into a graph, in front of a node that will use them."""

from typing import Any

import numpy as np
import onnx_ir
from onnx_ir import DataType

__all__ = ["Inserter", "constant", "replace_output", "weight"]


class Inserter:
    """A function of operators: ``insert("Mul", x, y)`` adds a node and returns its result.

    Args:
        graph: To change.
        before: New nodes are computed before this one.
    """

    def __init__(self, graph: onnx_ir.Graph, before: onnx_ir.Node) -> None:
        self.graph, self._before = graph, before

    def __call__(self, operator: str, *inputs: onnx_ir.Value, **attributes: Any) -> onnx_ir.Value:
        """Add a node with one output.

        Args:
            operator: Of the standard set.
            *inputs: In order.
            **attributes: By name.
        """
        node = onnx_ir.node(operator, inputs, attributes)
        self.graph.insert_before(self._before, node)
        return node.outputs[0]

    def like(self, model: onnx_ir.Value, operator: str, *inputs: onnx_ir.Value, **more: Any) -> onnx_ir.Value:
        """Likewise, a result with the shape and type of ``model``."""
        result = self(operator, *inputs, **more)
        result.shape, result.dtype = model.shape, model.dtype
        return result


def constant(graph: onnx_ir.Graph, name: str, value: Any, dtype: DataType) -> onnx_ir.Value:
    """Numbers that are the same in every call; one tensor for one name.

    Args:
        graph: To add it to, unless it is there.
        name: Of the constant.
        value: A number, or nested lists.
        dtype: Of the tensor.
    """
    found = graph.initializers.get(name)
    if found is not None:
        return found
    array = np.array(value, dtype=np.float64).astype(dtype.numpy())
    return weight(graph, onnx_ir.tensor(array, name=name))


def weight(graph: onnx_ir.Graph, tensor: Any) -> onnx_ir.Value:
    """A tensor under its own name, as an initializer."""
    value = onnx_ir.Value(
        name=tensor.name, shape=tensor.shape, type=onnx_ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def replace_output(node: onnx_ir.Node, result: onnx_ir.Value) -> None:
    """Let everything that used the node's output use ``result``, and take the node away."""
    output = node.outputs[0]
    result.shape, result.dtype = output.shape, output.dtype
    output.replace_all_uses_with(result)
    node.graph.remove(node, safe=True)
