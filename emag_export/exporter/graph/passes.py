"""What one engine wants otherwise than ONNX says it: passes over the exported graph, never another model.

The graph that a bundle is about holds standard operators only. Beside it lies, for an engine that has
something faster, a second graph of the same weights.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir
from onnx_ir import DataType
from onnxscript.rewriter import RewritePass
from onnxscript.rewriter.pattern import RewriteRule, RewriteRuleSet

from emag_export.bundle import engine_graph_file
from emag_export.exporter.graph.simplify import merge_equal

__all__ = ["ENGINE_RULES", "write_engine_graphs"]

_MICROSOFT = "com.microsoft"
_MASK_CHANNELS = 8
_LEAST_BIAS = -3e4
"""Stands for minus infinity, which times a zero is no number: far below any score, and float16 holds it."""


def _attention(op: Any, query: Any, key: Any, value: Any, scale: Any) -> Any:
    """``scaled_dot_product_attention`` without a mask, as torch writes it down; heads are an axis."""
    return op.MatMul(op.Softmax(_scores(op, query, key, scale), axis=-1), value)


def _masked_attention(op: Any, query: Any, key: Any, value: Any, scale: Any, bias: Any) -> Any:
    """Likewise, with a floating point mask."""
    scores = op.Add(_scores(op, query, key, scale), bias)
    return op.MatMul(op.Softmax(scores, axis=-1), value)


def _scores(op: Any, query: Any, key: Any, scale: Any) -> Any:
    rows = op.Reshape(key, _allow_other_inputs=True)
    transposed = op.Reshape(op.Transpose(rows, perm=[0, 2, 1]), _allow_other_inputs=True)
    return op.MatMul(op.Mul(query, scale), op.Mul(transposed, scale))


def _fused_attention(op: Any, query: Any, key: Any, value: Any, scale: Any) -> Any:
    """In onnxruntime, ``MultiHeadAttention`` never holds a whole map; it takes heads side by side."""
    queries, keys, values = (_tokens_first(op, tensor) for tensor in (query, key, value))
    return _multi_head(op, (queries, keys, values), query.shape, _squared(scale))


def _fused_masked_attention(op: Any, query: Any, key: Any, value: Any, scale: Any, bias: Any) -> Any:
    """The mask becomes one more channel: the bias in every key, and 1 in every query, to multiply it with.

    With the operator's own inputs for masks, ``key_padding_mask`` and ``attention_bias``, onnxruntime's CPU
    kernel holds whole maps: two rows of 2048 tokens and 8 heads take 315 MB and 212 ms; this takes 45 MB and
    199 ms, no mask 43 MB and 180 ms, plain operators 1057 MB and 240 ms. Fused kernels for GPUs want a
    multiple of 8 channels, so 7 more are zeros.
    """
    heads, scaled = query.shape[1], _squared(scale)
    first = np.zeros((1, 1, heads, _MASK_CHANNELS), dtype=np.float32)
    first[..., 0] = 1
    one = op.Constant(value=onnx_ir.tensor(first))
    wide = op.Mul(op.Cast(bias, to=DataType.FLOAT), op.Constant(value_float=1 / scaled))
    hidden = op.Max(op.Transpose(wide, perm=[0, 3, 1, 2]), op.Constant(value_float=_LEAST_BIAS))
    queries, keys, values = (_tokens_first(op, tensor) for tensor in (query, key, value))
    queries, keys = (
        op.Concat(tensor, op.Cast(op.Expand(channels, _per_token(op, tensor)), to=query.dtype), axis=3)
        for tensor, channels in ((queries, one), (keys, op.Mul(hidden, one)))
    )
    return _multi_head(op, (queries, keys, values), query.shape, scaled)


def _per_token(op: Any, heads: Any) -> Any:
    """The sizes [rows, tokens, 1, 1]."""
    return op.Concat(op.Shape(heads, start=0, end=2), op.Constant(value_ints=[1, 1]), axis=0)


def _tokens_first(op: Any, heads: Any) -> Any:
    return op.Transpose(heads, perm=[0, 2, 1, 3])


def _multi_head(op: Any, mixed: tuple[Any, Any, Any], shape: Any, scale: float) -> Any:
    """The operator on [rows, tokens, heads, channels], which it takes with heads side by side."""
    heads, width = shape[1], shape[3]
    flat = op.Constant(value_ints=[0, 0, -1])
    attended = op.MultiHeadAttention(
        *(op.Reshape(tensor, flat) for tensor in mixed),
        num_heads=heads,
        scale=scale,
        _domain=_MICROSOFT,
        _version=1,
    )
    split = op.Constant(value_ints=[0, 0, heads, width])
    return op.Transpose(op.Reshape(attended, split), perm=[0, 2, 1, 3])


def _squared(scale: Any) -> float:
    """Torch multiplies queries and keys by the root of what scores are multiplied by."""
    return float(scale.const_value.numpy().item()) ** 2


def _can_be_fused(context: Any, query: Any, scale: Any, **_: Any) -> bool:
    """Heads and their width are known, the scale is a number, and the operator knows the type."""
    known = query.shape is not None and len(query.shape) == 4 and scale.const_value is not None
    return known and query.dtype in (DataType.FLOAT, DataType.FLOAT16, DataType.BFLOAT16)


def _can_be_fused_masked(context: Any, query: Any, scale: Any, bias: Any, **_: Any) -> bool:
    """Moreover the mask hides keys from a whole row, as of padding, not from single queries or heads."""
    over_keys = bias.shape is not None and len(bias.shape) == 4 and list(bias.shape[1:3]) == [1, 1]
    return over_keys and _can_be_fused(context, query, scale)


def _normed(op: Any, x: Any, epsilon: Any) -> Any:
    """X over the root of its mean square along the last axis, as torch writes ``rsqrt`` down."""
    mean = op.ReduceMean(op.Pow(x, 2.0), _allow_other_inputs=True, _outputs=["mean"])
    return op.Mul(x, op.Reciprocal(op.Sqrt(op.Add(mean, epsilon))))


def _rms_norm(op: Any, x: Any, epsilon: Any, weight: Any) -> Any:
    return op.Mul(_normed(op, x, epsilon), weight)


def _half_rms_norm(op: Any, x: Any, epsilon: Any, weight: Any) -> Any:
    """In half precision torch computes it in float32, and rounds before the weight."""
    return op.Mul(op.Cast(_normed(op, op.Cast(x, to=DataType.FLOAT), epsilon)), weight)


def _fused_rms_norm(op: Any, x: Any, epsilon: Any, weight: Any, **_: Any) -> Any:
    """Onnxruntime's name for it; computed in float32, whatever the type."""
    value = float(epsilon.const_value.numpy().item())
    return op.SimplifiedLayerNormalization(x, weight, axis=-1, epsilon=value, stash_type=1)


def _is_rms_norm(context: Any, x: Any, epsilon: Any, weight: Any, mean: Any, **_: Any) -> bool:
    """The mean is over the last axis, of which the weight has one number per item, and epsilon is known."""
    (axes,) = (value.const_value for value in mean.producer().inputs[1:])
    last = axes is not None and axes.numpy().tolist() in ([-1], [len(x.shape or ()) - 1])
    return last and epsilon.const_value is not None and weight.shape is not None and len(weight.shape) == 1


def _integer_product(op: Any, tokens: Any, weight: Any, middle: Any, scales: Any) -> Any:
    """What a quantised linear multiplies, and the scales of its outputs."""
    return op.Mul(op.Cast(op.MatMulInteger(tokens, weight, middle), to=DataType.FLOAT), scales)


def _fused_integer_product(op: Any, tokens: Any, weight: Any, middle: Any, scales: Any) -> Any:
    """One operator, which never holds the product in integers."""
    one = op.Constant(value_float=1.0)
    return op.MatMulIntegerToFloat(tokens, weight, one, scales, middle, _domain=_MICROSOFT, _version=1)


def _is_per_output(context: Any, weight: Any, scales: Any, **_: Any) -> bool:
    """A scale per output, and a weight that is the same in every call."""
    return weight.is_initializer() and scales.is_initializer() and len(scales.shape) == 1


ENGINE_RULES: Mapping[str, RewriteRuleSet] = MappingProxyType(
    {
        "onnxruntime": RewriteRuleSet(
            [
                RewriteRule(_half_rms_norm, _fused_rms_norm, _is_rms_norm),
                RewriteRule(_rms_norm, _fused_rms_norm, _is_rms_norm),
                RewriteRule(_attention, _fused_attention, _can_be_fused),
                RewriteRule(_masked_attention, _fused_masked_attention, _can_be_fused_masked),
                RewriteRule(_integer_product, _fused_integer_product, _is_per_output),
            ]
        )
    }
)
"""Backend to what is rewritten for it.

Measured on a CPU, in steps of a denoiser: fused attention saves 7 % at 256 image tokens and 10 % at 1024.
Making one ``Gemm`` of every product and its bias saved 1.5 %, which is not worth a rule. RMS norms as one
operator make no difference on a CPU (1.00 and 1.01 times the step without the rule, 256 and 1024 image
tokens, 24 blocks); the rule is for GPUs, where it takes one launch in place of eight.
"""


def write_engine_graphs(graph: Path) -> list[Path]:
    """Write the graphs that engines take instead of this one, where a rule applies.

    Args:
        graph: With its external data beside it, which the new graphs use too.
    """
    written = []
    for engine, rules in ENGINE_RULES.items():
        model = onnx_ir.load(graph)
        if not RewritePass(rules)(model).modified:
            continue
        merge_equal(model)  # all blocks hide the same keys
        path = graph.with_name(engine_graph_file(engine))
        onnx_ir.save(model, path)
        written.append(path)
    return written
