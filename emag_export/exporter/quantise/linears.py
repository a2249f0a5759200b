"""Find the linears of a denoiser in its traced graph, by the names that they have in the model."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir

from emag_export.errors import ExportError

__all__ = ["SCOPES", "Linear", "behind_fork", "linears_of"]

SCOPES = "pkg.torch.onnx.name_scopes"
"""Where the tracer writes down which modules a node comes from, the outermost first, then the operator."""

_IN_BLOCK = re.compile(r"\w+\.\d+\.(?!.*\bemb\.)")
"""A name in a list of blocks. Left out are embedders of time that some blocks have of their own, as embedders
elsewhere are."""


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A product with a weight."""

    name: str
    """Of the module: ``transformer_blocks.0.attn.to_q``."""
    node: onnx_ir.Node
    """``MatMul``, or ``Gemm`` with its bias."""
    in_block: bool
    """Whether it is part of a block; embedders and what makes the prediction are not."""
    per_token: bool
    """Whether its input has an axis of tokens; modulation has one vector a row."""

    @property
    def weight(self) -> onnx_ir.Value:
        """[inputs, outputs], or the other way round where :attr:`transposed`."""
        value = self.node.inputs[1]
        assert value is not None, "that is how linears are found"
        return value

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored as in PyTorch, [outputs, inputs]."""
        attribute = self.node.attributes.get("transB")
        return attribute is not None and bool(attribute.as_int())


def linears_of(model: onnx_ir.Model) -> Iterator[Linear]:
    """Every product with a weight of two axes.

    Args:
        model: As the tracer made it, with its metadata, and with shapes.

    Raises:
        ExportError: If one has no name: what it is could then not be told.
    """
    for node in model.graph:
        if node.op_type not in ("MatMul", "Gemm") or node.domain:
            continue
        data, weight = node.inputs[:2]
        if weight is None or weight.const_value is None or len(weight.const_value.shape) != 2:
            continue
        name = _module(node)
        if name is None or data is None or data.shape is None:
            raise ExportError(
                f"the product {node.name} has no module to its name: it cannot be told whether it may be "
                "quantised; please report this model, and the versions of PyTorch and onnxscript"
            )
        yield Linear(
            name=name,
            node=node,
            in_block=_IN_BLOCK.match(name) is not None,
            per_token=len(data.shape) > 2,
        )


def _module(node: onnx_ir.Node) -> str | None:
    """The module that the node computes; the fork's own name for the model, ``model``, is left out."""
    scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))
    modules = [scope for scope in scopes[:-1] if scope]
    return modules[-1].removeprefix("model.") if modules else None


def behind_fork(model: onnx_ir.Model, branch_rows: str) -> set[onnx_ir.Value]:
    """Values with the rows that continue behind the fork.

    Args:
        model: Of a forked denoiser.
        branch_rows: Name of the input that says which trunk row every one of them continues.

    Raises:
        ExportError: If there is no fork.
    """
    (rows,) = (value for value in model.graph.inputs if value.name == branch_rows)
    found: set[onnx_ir.Value] = set()
    waiting = [node.outputs[0] for node in _gathers(rows)]
    if not waiting:
        raise ExportError(f"nothing gathers {branch_rows} in this graph; please report this model")
    while waiting:
        value = waiting.pop()
        if value not in found:
            found.add(value)
            waiting.extend(output for node, _ in value.uses() for output in node.outputs)
    return found


def _gathers(rows: onnx_ir.Value) -> Iterator[onnx_ir.Node]:
    """Nodes that take these rows of something, whatever shape or type the indices were brought into."""
    for node, index in rows.uses():
        if node.op_type == "Gather" and index == 1:
            yield node
        elif node.op_type in ("Reshape", "Cast", "Unsqueeze") and index == 0:
            yield from _gathers(node.outputs[0])
