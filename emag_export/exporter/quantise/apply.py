"""Apply a scheme of quantisation to the traced graph of a denoiser.

Rounded are the linears of the blocks, modulation included. What stays in the graph's precision: embedders of
patches, text and time, and ``norm_out`` and ``proj_out`` behind the last block, whose rounding no later layer
evens out; attention, unless it is asked for; norms, residual sums, and everything about averages.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import onnx_ir
from onnx_ir import DataType

from emag_export.errors import ExportError
from emag_export.exporter.quantise.attention import quantise_attention
from emag_export.exporter.quantise.differences import Differences
from emag_export.exporter.quantise.fp8 import in_fp8
from emag_export.exporter.quantise.insert import Inserter, replace_output, weight
from emag_export.exporter.quantise.linears import Linear, behind_fork, linears_of
from emag_export.exporter.quantise.rounding import FORMATS, Rounded
from emag_export.exporter.quantise.tokens import Tokens
from emag_export.quantisation import Quantisation, Scheme

__all__ = ["HEADROOM", "quantise"]

HEADROOM = 2.0
"""What a measured range is multiplied with: other prompts may exceed it. A float keeps its relative precision
when its range is too large, and is cut when it is too small."""

_LEAST_RANGE = 1e-4
"""Of a tensor that was zero in every call of the calibration; float16 holds the scale."""


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What all rules need."""

    graph: onnx_ir.Graph
    dtype: DataType
    """Of the graph's activations."""
    differences: Differences
    tokens: Tokens
    ranges: Mapping[str, float]

    def range_of(self, name: str) -> float:
        """The largest value that eight bits shall stand for.

        Raises:
            ExportError: If it was not measured.
        """
        if name not in self.ranges:
            raise ExportError(f"the calibration saw nothing of {name}; please report this model")
        return max(HEADROOM * self.ranges[name], _LEAST_RANGE)


def quantise(
    model: onnx_ir.Model,
    quantisation: Quantisation,
    ranges: Mapping[str, float],
    branch_rows: str = "branch_rows",
) -> list[str]:
    """Change the graph in place.

    Weights are rounded when they are written, one at a time.

    Args:
        model: Of the forked denoiser, with the tracer's metadata and named axes.
        quantisation: The scheme.
        ranges: Linear, or part of an attention, to its largest value, where the scheme is calibrated.
        branch_rows: Name of the input that forks the rows.

    Returns:
        Names of the linears that were rounded.

    Raises:
        ExportError: If a linear has no name, or no range.
    """
    graph = model.graph
    latents = graph.inputs[0]
    assert latents.dtype is not None, "the contract says what it is"
    found = [linear for linear in linears_of(model) if linear.in_block]
    work = _Work(
        graph=graph,
        dtype=latents.dtype,
        differences=Differences(
            graph,
            branch_rows,
            behind_fork(model, branch_rows),
            as_product=quantisation.scheme == Scheme.INT8,
        ),
        tokens=Tokens(latents.dtype, _LEAST_RANGE),
        ranges=ranges,
    )
    rules: Mapping[Scheme, Callable[[_Work, Linear], None]] = {
        Scheme.W8: _round_weight,
        Scheme.FP8: _fp8,
        Scheme.INT8: _int8,
    }
    for linear in found:
        rules[quantisation.scheme](work, linear)
    if quantisation.attention:
        quantise_attention(graph, work.range_of, latents.dtype)
    _drop_unused(graph)
    return [linear.name for linear in found]


def _round_weight(work: _Work, linear: Linear) -> None:
    """The weight alone: it is multiplied out in front of the product, which TensorRT makes one kernel of."""
    linear.node.replace_input_with(1, _multiplied_out(work, linear, "int8"))


def _multiplied_out(work: _Work, linear: Linear, form: str) -> onnx_ir.Value:
    stored = linear.weight
    rounded = Rounded(stored.const_value, 0 if linear.transposed else 1, FORMATS[form], work.dtype)
    numbers, scales = _stored(work, linear, rounded, form)
    insert = Inserter(work.graph, linear.node)
    return insert.like(stored, "DequantizeLinear", numbers, scales, axis=rounded.axis)


def _stored(work: _Work, linear: Linear, rounded: Rounded, form: str) -> tuple[onnx_ir.Value, onnx_ir.Value]:
    """Numbers and scales, written in this order: rounding finds the scales, so a weight is read once."""
    name = f"{linear.name}.weight"
    numbers = weight(work.graph, rounded.numbers(f"{name}.{form}"))
    return numbers, weight(work.graph, rounded.scales(f"{name}.scale"))


def _fp8(work: _Work, linear: Linear) -> None:
    """Weight and input, which goes through as differences; of modulation the weight alone."""
    if not linear.per_token:
        _round_weight(work, linear)
        return
    node, graph = linear.node, work.graph
    insert, data = Inserter(graph, node), _input(linear)
    differs = work.differences.apply_to(data)
    taken = work.differences.taken(data, insert) if differs else data
    node.replace_input_with(0, in_fp8(insert, taken, work.range_of(linear.name), work.dtype))
    node.replace_input_with(1, _multiplied_out(work, linear, "fp8"))
    if differs:
        product = insert.like(node.outputs[0], node.op_type, *node.inputs)
        replace_output(node, work.differences.put_back(product, product, insert))


def _int8(work: _Work, linear: Linear) -> None:
    """Weight and input, of every token with the range that it has.

    So no range needs to be known before, and an image's numbers do not depend on its company: onnxruntime's
    own dynamic quantisation has one range for all rows of a call.
    """
    node, graph, tokens = linear.node, work.graph, work.tokens
    insert, data = Inserter(graph, node), _input(linear)
    differs = linear.per_token and work.differences.apply_to(data)
    taken = work.differences.taken(data, insert) if differs else data
    stored, form = linear.weight, FORMATS["int8"]
    turned = linear.transposed
    rounded = Rounded(stored.const_value, 0 if turned else 1, form, work.dtype, transpose=turned)
    numbers, scales = _stored(work, linear, rounded, "int8")
    result = tokens.multiplied(tokens.rounded(taken, insert), numbers, scales, insert)
    output = node.outputs[0]
    if differs:
        result = work.differences.put_back(result, output, insert)
    elif linear.per_token:
        result = tokens.with_rows(result, data, rounded.outputs, insert)
    if node.op_type == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None:
        result = insert("Add", result, node.inputs[2])
    replace_output(node, result)


def _input(linear: Linear) -> onnx_ir.Value:
    value = linear.node.inputs[0]
    assert value is not None, "a product has two inputs"
    return value


def _drop_unused(graph: onnx_ir.Graph) -> None:
    """Take away nodes and weights that nothing uses any more: what the rounded ones replace."""
    for node in reversed(list(graph)):
        if not any(output.uses() or output.is_graph_output() for output in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]
