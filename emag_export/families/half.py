"""What stays in float32 when a model is exported in float16, whose largest number is 65504.

The published text encoders and autoencoders were trained in float32 or bfloat16. Some of their activations
are larger than float16 can hold, and one infinity makes every later number useless. bfloat16 has the range of
float32 and needs none of this.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import group_norm

__all__ = ["keep_attention_in_float32", "keep_norms_in_float32"]

_ATTENTION = "emag_float32"


def keep_attention_in_float32(model: Any) -> Any:
    """Let a float16 model of transformers compute scores and softmax in float32; other models are unchanged.

    Models that do not scale their scores overflow there first. What else must stay in float32,
    transformers keeps itself (``_keep_in_fp32_modules``).

    Args:
        model: A text encoder. It is changed.
    """
    if model.dtype is not torch.float16:
        return model
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(_ATTENTION, _attention)
    AttentionMaskInterface.register(_ATTENTION, eager_mask)
    model.set_attn_implementation(_ATTENTION)
    return model


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of [rows, heads, tokens, width]; gives [rows, tokens, heads, width] in the values' dtype."""
    scale, bias = options.get("scaling"), options.get("position_bias")
    groups = query.shape[1] // key.shape[1]  # of heads that share keys and values
    key, value = (x if groups == 1 else x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query.float() @ key.float().transpose(-1, -2)
    scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
    for term in (bias, attention_mask):
        if term is not None:
            scores = scores + term.float()
    mixed = scores.softmax(dim=-1) @ value.float()
    return mixed.to(value.dtype).transpose(1, 2).contiguous(), None


class _Float32GroupNorm(nn.Module):
    """A group norm whose sums are in float32, between casts."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.norm = norm.float()

    def forward(self, sample: Tensor) -> Tensor:
        norm = self.norm
        wide = group_norm(sample.float(), norm.num_groups, norm.weight, norm.bias, norm.eps)
        return wide.to(sample.dtype)


def keep_norms_in_float32(model: Any) -> Any:
    """Let a float16 model of diffusers compute its group norms in float32; other models are unchanged.

    Args:
        model: An autoencoder. It is changed.
    """
    if model.dtype is not torch.float16:
        return model
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.GroupNorm):
                setattr(module, name, _Float32GroupNorm(child))
    return model
