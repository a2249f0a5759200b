"""Seeded random weights of a component, made in the wanted precision: one copy, no float32 detour."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

__all__ = ["random_component"]


def random_component(kind: Any, config: Mapping[str, Any], *, dtype: torch.dtype, seed: int) -> nn.Module:
    """A model of this configuration, initialised as its library does before training.

    That keeps activations finite in half precision: initial weights shrink with width, and norms and
    gates hold the residual stream at the scale of its input.

    Args:
        kind: Model class of diffusers or transformers.
        config: Its configuration.
        dtype: Of the weights.
        seed: Same seed, same weights.
    """
    before = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_default_dtype(dtype)
        try:
            if hasattr(kind, "from_config"):  # diffusers
                model: nn.Module = kind.from_config(dict(config))
            else:
                model = kind(kind.config_class.from_dict(dict(config)))
        finally:
            torch.set_default_dtype(before)
    model = model.to(dtype)
    if dtype is torch.float16:  # as from_pretrained does: activations of T5 exceed what float16 holds
        kept = getattr(kind, "_keep_in_fp32_modules", None) or ()
        for name, part in model.named_modules():
            if name.rpartition(".")[2] in kept:
                part.float()
    return model
