"""Projections of attention, split into heads: what most diffusers models do in the same words."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["joint", "split_heads"]


def split_heads(
    projected: Float[Tensor, "rows tokens width"], heads: int, norm: nn.Module | None = None
) -> Float[Tensor, "rows heads tokens head_dim"]:
    """One projection by heads, behind its norm where it has one.

    Args:
        projected: Query, key or value.
        heads: Divides the width.
        norm: Over the numbers of a head.
    """
    split: Tensor = projected.unflatten(2, (heads, -1)).transpose(1, 2)
    return split if norm is None else norm(split)


def joint(
    image: Float[Tensor, "rows heads tokens head_dim"], text: Float[Tensor, "rows heads text head_dim"]
) -> Float[Tensor, "rows heads keys head_dim"]:
    """Image tokens first, then those of the text."""
    return torch.cat([image, text], dim=2)
