"""Make a freshly traced graph small: what onnxscript's ``optimize_ir`` does, in an order that takes a third.

Its rewriter tries every rule at every node, three times. Here it runs once, on the third of the nodes that
are left when constants are folded and equal expressions are merged. Measured on ten small blocks of SD3, 3960
nodes: 2.3 s in place of 7.2, and the same 1147 nodes come out.
"""

import onnx_ir
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    DeduplicateInitializersPass,
    InlinePass,
    LiftConstantsToInitializersPass,
    LiftSubgraphInitializersToMainGraphPass,
    NameFixPass,
    OutputFixPass,
    RemoveUnusedNodesPass,
)
from onnxscript.optimizer import fold_constants
from onnxscript.rewriter import rewrite

__all__ = ["merge_equal", "simplify"]


def simplify(model: onnx_ir.Model) -> None:
    """Fold constants, merge equal expressions and apply onnxscript's rules, in place.

    Args:
        model: As ``torch.onnx.export(optimize=False)`` makes it.
    """
    InlinePass()(model)
    fold_constants(model, onnx_shape_inference=True)
    merge_equal(model)
    rewrite(model)
    fold_constants(model, onnx_shape_inference=True)
    RemoveUnusedNodesPass()(model)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    LiftSubgraphInitializersToMainGraphPass()(model)
    DeduplicateInitializersPass()(model)
    merge_equal(model)
    OutputFixPass()(model)
    NameFixPass()(model)


def merge_equal(model: onnx_ir.Model) -> None:
    """Let every expression be computed once, and drop what no output needs, in place."""
    RemoveUnusedNodesPass()(model)
    CommonSubexpressionEliminationPass()(model)
    RemoveUnusedNodesPass()(model)
