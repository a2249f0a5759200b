"""What stays in float32 when a model is exported in float16, whose largest number is 65504.

The published text encoders and autoencoders were trained in float32 or bfloat16. Some of their activations
are larger than float16 can hold, and one infinity makes every later number useless. bfloat16 has the range of
float32 and needs none of this.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import group_norm

__all__ = ["PRECISION_NOTES", "keep_attention_in_float32", "keep_norms_in_float32", "weights_precision"]

_CLIP_NOTE = "attention scores, softmax and layer norms: sums over many terms lose digits in float16"

PRECISION_NOTES: Mapping[str, str] = MappingProxyType(
    {
        "transformer": "sums of layer norms, timesteps, and the moving averages where the contract says so",
        "text_encoder": _CLIP_NOTE,
        "text_encoder_2": _CLIP_NOTE,
        "text_encoder_3": "the feed-forward's second projection (wo), the residual stream from the first one "
        "on, norms, attention scores and softmax: activations of T5 exceed 65504",
        "vae_decoder": "all but input and output where the configuration says force_upcast, otherwise group "
        "norms: activations of some checkpoints exceed 65504",
    }
)
"""Component to what a float16 bundle computes in float32, and why; for ``bundle.json``."""

_ATTENTION = "emag_float32"


def weights_precision(config: Mapping[str, Any], model_class: str, precision: str) -> str:
    """The precision to load a component's weights in.

    An autoencoder that says ``force_upcast`` stays in float32 in a float16 bundle; its graph still takes and
    gives float16. diffusers' SDXL pipelines do the same, its SD3 pipeline ignores the flag.

    Args:
        config: Of the component.
        model_class: Of the component.
        precision: Of the bundle.
    """
    # AutoencoderKL's own default for the flag is True.
    upcast = model_class == "AutoencoderKL" and config.get("force_upcast", True)
    return "float32" if upcast and precision == "float16" else precision


def keep_attention_in_float32(model: Any) -> Any:
    """Let a float16 model of transformers compute scores and softmax in float32; other models are unchanged.

    T5 does not scale its scores, so they overflow first there. ``wo`` and the residual stream of T5 are kept
    in float32 by transformers itself (``_keep_in_fp32_modules``).

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
