"""Rotary position embeddings: tables made once by torch, and the rotation; traced into several graphs.

Angles are computed before a graph is traced, in the precision of the family's own model. In the graph there
are only rows of these tables, so no other library has to agree with torch on a sine, and there is no float64
and no complex number.
"""

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["grid_rows", "rotary_table", "rotate"]


def rotary_table(
    positions: int, width: int, *, theta: float
) -> tuple[Float[Tensor, "positions half"], Float[Tensor, "positions half"]]:
    """Cosines and sines of positions 0, 1, 2 … on one axis, float32; angles are float64.

    Args:
        positions: How many.
        width: Numbers of a head that turn with this axis; two share an angle.
        theta: Base of the frequencies: theta^(-2 i / width) radians per position.

    Source:
        arXiv:2104.09864, eq. 15; the precision of diffusers' ``FluxPosEmbed``.
    """
    exponents = torch.arange(0, width, 2, dtype=torch.float64) / width
    angles = torch.outer(torch.arange(positions, dtype=torch.float64), 1.0 / theta**exponents)
    return angles.cos().float(), angles.sin().float()


def grid_rows(
    over_height: Float[Tensor, "rows half_of_height"],
    over_width: Float[Tensor, "columns half_of_width"],
) -> Float[Tensor, "tokens half"]:
    """One table of a grid's tokens, row by row, from one per side: both side by side."""
    height, width = over_height.shape[0], over_width.shape[0]
    return torch.cat(
        [over_height[:, None].expand(-1, width, -1), over_width[None].expand(height, -1, -1)], dim=-1
    ).flatten(0, 1)


def rotate(
    heads: Float[Tensor, "rows heads tokens head_dim"],
    cos: Float[Tensor, "*rows tokens half"],
    sin: Float[Tensor, "*rows tokens half"],
) -> Float[Tensor, "rows heads tokens head_dim"]:
    """Turn every pair of neighbouring numbers by its angle, in float32.

    Args:
        heads: Queries or keys.
        cos: Of every token and pair; with rows and heads (of size 1) in front where they differ by row.
        sin: Likewise.
    """
    even, odd = heads.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return turned.flatten(-2).to(heads.dtype)
