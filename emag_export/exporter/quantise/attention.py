"""FP8 in the attention of every block: queries, keys, softmax and values. Only on demand: it costs guidance.

That of the averages themselves, which a kind of negative computes beside it, stays as it is.
"""

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import onnx_ir
from onnx_ir import DataType

from emag_export.errors import ExportError
from emag_export.exporter.quantise.fp8 import in_fp8
from emag_export.exporter.quantise.insert import Inserter
from emag_export.exporter.quantise.linears import SCOPES

__all__ = ["attention_part", "quantise_attention"]

_CALL = re.compile(r"scaled_dot_product_attention(?:_(\d+))?")
"""What the tracer calls the calls of that function, in their order."""


def attention_part(call: int, part: str) -> str:
    """What the range of a part of an attention is called.

    Args:
        call: Which call of ``scaled_dot_product_attention`` it is in one of the denoiser, from 0.
        part: ``query`` or ``key``, both as they are multiplied, or ``value``.
    """
    return f"attention.{call}.{part}"


@dataclass(frozen=True, kw_only=True)
class _Attention:
    call: int
    scores: onnx_ir.Node
    """Product of queries and keys."""
    mixed: onnx_ir.Node
    """Product of softmax and values."""


def quantise_attention(graph: onnx_ir.Graph, range_of: Callable[[str], float], dtype: DataType) -> None:
    """Round what goes into both products of every attention.

    Args:
        graph: To change, with the tracer's metadata.
        range_of: From :func:`attention_part` to a range.
        dtype: Of the graph's activations.

    Raises:
        ExportError: If no attention is found.
    """
    found = list(_attentions(graph))
    if not found:
        raise ExportError("no attention was found in the graph; build without `fp8_attention`")
    for attention in found:
        for node, parts in ((attention.scores, ("query", "key")), (attention.mixed, ("softmax", "value"))):
            insert = Inserter(graph, node)
            for index, part in enumerate(parts):
                largest = 1.0 if part == "softmax" else range_of(attention_part(attention.call, part))
                value = node.inputs[index]
                assert value is not None, "a product has two inputs"
                node.replace_input_with(index, in_fp8(insert, value, largest, dtype))


def _attentions(graph: onnx_ir.Graph) -> Iterator[_Attention]:
    for node in graph:
        if node.op_type != "Softmax":
            continue
        scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "['']"))
        call = _CALL.fullmatch(scopes[-1])
        if call is None:
            continue
        scores = node.inputs[0]
        while scores is not None and (before := scores.producer()) is not None and before.op_type == "Add":
            scores = before.inputs[0]  # a mask
        product = None if scores is None else scores.producer()
        mixed = next((user for user, _ in node.outputs[0].uses() if user.op_type == "MatMul"), None)
        if product is not None and product.op_type == "MatMul" and mixed is not None:
            yield _Attention(call=int(call[1] or 0), scores=product, mixed=mixed)
