"""What every hard negative is told about the rows it may perturb, and what it says of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from emag_export.families.protocol import Heads
from emag_export.kinds import Renorm

__all__ = ["Attended", "Tracking", "blend", "per_row", "with_image_queries"]


@dataclass(frozen=True, kw_only=True)
class Tracking:
    """What this call does with the tracked rows in one candidate block."""

    rows: Int[Tensor, " tracked"]
    """Which rows are tracked: the last ones, ascending."""
    strength: Float[Tensor, " tracked"]
    """lambda: 1 perturbs a row wholly, 0 leaves it."""
    average: Float[Tensor, " tracked *state"] | None = None
    """Moving averages; None for kinds that keep nothing."""
    step: Float[Tensor, " tracked"] | None = None
    """a in E + a (X - E): 1 starts an average, 1 - beta continues it, 0 holds it."""
    blur: tuple[Tensor, ...] = ()
    """Per side of the grid a matrix for every tracked row, [tracked, side, side]; for kinds that blur."""
    renorm: Renorm = Renorm.ROW
    """How a partly replaced softmax row is brought back to sum one."""


@dataclass(frozen=True, kw_only=True)
class Attended:
    """Result of one candidate block's attention."""

    hidden: Float[Tensor, "rows heads tokens head_dim"]
    """Before the output projection."""
    average: Sequence[Float[Tensor, " tracked _ *state"]] = ()
    """The new averages, a few heads each: put together only where they leave the graph."""
    delta: Float[Tensor, " tracked"] | None = None
    """mean |E_old - X| per tracked row; None without an average."""


def per_row(values: Float[Tensor, " tracked"], like: Tensor) -> Tensor:
    """One number a row, in the dtype of ``like`` and with as many axes."""
    return values.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def blend(live: Tensor, other: Tensor, strength: Float[Tensor, " tracked"]) -> Tensor:
    """(1 - lambda) live + lambda other, row by row."""
    strength = per_row(strength, live)
    return (1 - strength) * live + strength * other


def with_image_queries(
    heads: Heads, tracking: Tracking, image_query: Float[Tensor, "tracked heads image head_dim"]
) -> Float[Tensor, "rows heads tokens head_dim"]:
    """The queries of all rows, with the tracked rows' image queries replaced."""
    text = heads.query.index_select(0, tracking.rows)[:, :, heads.image_tokens :]
    return heads.query.index_copy(0, tracking.rows, torch.cat([image_query, text], dim=2))
