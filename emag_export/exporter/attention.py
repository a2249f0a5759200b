"""Attention of a candidate block: the tracked rows' live quantity is averaged, and replaced on demand.

Everything here is traced into the graph, so it is written without branches on data: the average
starts (a = 1), continues (a = 1 - beta) or holds (a = 0), and a row is replaced (lambda = 1) or left
alone (lambda = 0), by arithmetic alone.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from emag_export.contract import Renorm, Variant

__all__ = ["EmaAttention", "JointHeads", "Tracking", "ema_attention"]

_ROW_SUM_FLOOR = 1e-12


@dataclass(frozen=True, kw_only=True)
class JointHeads:
    """Queries, keys and values of all rows, image tokens first, then text tokens."""

    query: Float[Tensor, "rows heads keys head_dim"]
    key: Float[Tensor, "rows heads keys head_dim"]
    value: Float[Tensor, "rows heads keys head_dim"]
    image_tokens: int | torch.SymInt


@dataclass(frozen=True, kw_only=True)
class Tracking:
    """Moving averages of one candidate block and what this call does with them."""

    rows: Int[Tensor, " tracked"]
    """Which rows are tracked: the last ones, ascending."""
    average: Float[Tensor, " tracked *state"]
    step: Float[Tensor, " tracked"]
    """a in E + a (X - E): 1 starts an average, 1 - beta continues it, 0 holds it."""
    strength: Float[Tensor, " tracked"]
    """lambda: 1 replaces the live quantity by its average, 0 leaves it."""


@dataclass(frozen=True, kw_only=True)
class EmaAttention:
    """Result of one candidate block's attention."""

    hidden: Float[Tensor, "rows heads keys head_dim"]
    average: Float[Tensor, " tracked *state"]
    delta: Float[Tensor, " tracked"]
    """mean |E_old - X| per tracked row."""


def ema_attention(
    heads: JointHeads, tracking: Tracking, *, variant: Variant, renorm: Renorm = Renorm.ROW
) -> EmaAttention:
    """Joint attention in which the tracked rows follow, and may use, a moving average.

    Args:
        heads: Projected and normalised queries, keys, values.
        tracking: State and controls of this block.
        variant: Which quantity is averaged.
        renorm: How a partly replaced row is brought back to sum one.

    Returns:
        Attention before the output projection, the new averages, and Delta.

    Source:
        arXiv:2512.17303, eqs. 8-13; update order as in the released code.
    """
    if variant is Variant.EMAG_Q:
        return _query(heads, tracking)
    return _map(heads, tracking, _REGIONS[variant], renorm)


def _query(heads: JointHeads, tracking: Tracking) -> EmaAttention:
    query, image = heads.query, heads.image_tokens
    live = query.index_select(0, tracking.rows)[:, :, :image]
    grid = tracking.average.shape[2:4]
    average, delta = _update(live.unflatten(2, grid), tracking)
    replaced = _blend(live, average.flatten(2, 3).to(live.dtype), tracking.strength)
    text = query.index_select(0, tracking.rows)[:, :, image:]
    query = query.index_copy(0, tracking.rows, torch.cat([replaced, text], dim=2))
    hidden = scaled_dot_product_attention(query, heads.key, heads.value)
    return EmaAttention(hidden=hidden, average=average, delta=delta)


def _map(
    heads: JointHeads,
    tracking: Tracking,
    region: Callable[[Tensor, int | torch.SymInt], Tensor],
    renorm: Renorm,
) -> EmaAttention:
    image = heads.image_tokens
    query, key, value = (x.index_select(0, tracking.rows) for x in (heads.query, heads.key, heads.value))
    scores = query[:, :, :image] @ key.transpose(-2, -1) * heads.query.shape[-1] ** -0.5
    rows = scores.float().softmax(dim=-1)
    live = region(rows, image)
    average, delta = _update(live, tracking)
    replaced = _splice(rows, _blend(live, average, tracking.strength), region, image)
    if region is not _full_rows:
        used = tracking.strength[:, None, None, None] > 0
        replaced = torch.where(used, _renormalise(replaced, image, renorm), replaced)
    hidden = scaled_dot_product_attention(heads.query, heads.key, heads.value)
    tracked = torch.cat(
        [replaced.to(value.dtype) @ value, hidden.index_select(0, tracking.rows)[:, :, image:]], dim=2
    )
    return EmaAttention(hidden=hidden.index_copy(0, tracking.rows, tracked), average=average, delta=delta)


def _update(live: Tensor, tracking: Tracking) -> tuple[Tensor, Tensor]:
    live = live.to(tracking.average.dtype)
    change = live - tracking.average
    delta = change.float().abs().flatten(1).mean(dim=1)
    return tracking.average + _per_row(tracking.step, change) * change, delta


def _blend(live: Tensor, average: Tensor, strength: Tensor) -> Tensor:
    strength = _per_row(strength, live)
    return (1 - strength) * live + strength * average


def _per_row(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def _full_rows(rows: Tensor, image: int | torch.SymInt) -> Tensor:
    return rows


def _image_block(rows: Tensor, image: int | torch.SymInt) -> Tensor:
    return rows[..., :image]


def _text_block(rows: Tensor, image: int | torch.SymInt) -> Tensor:
    return rows[..., image:]


_REGIONS = {Variant.EMAG: _full_rows, Variant.EMAG_I: _image_block, Variant.EMAG_T: _text_block}


def _splice(rows: Tensor, part: Tensor, region: Callable[..., Tensor], image: int | torch.SymInt) -> Tensor:
    """``rows`` with the given region exchanged for ``part``."""
    if region is _full_rows:
        return part
    if region is _image_block:
        return torch.cat([part, _text_block(rows, image)], dim=-1)
    return torch.cat([_image_block(rows, image), part], dim=-1)


def _renormalise(rows: Tensor, image: int | torch.SymInt, renorm: Renorm) -> Tensor:
    if renorm is Renorm.NONE:
        return rows
    if renorm is Renorm.ROW:
        return rows / rows.sum(dim=-1, keepdim=True).clamp_min(_ROW_SUM_FLOOR)
    to_image, to_text = _image_block(rows, image), _text_block(rows, image)
    missing = (1 - to_image.sum(dim=-1, keepdim=True)).clamp_min(0)
    to_text = to_text * (missing / to_text.sum(dim=-1, keepdim=True).clamp_min(_ROW_SUM_FLOOR))
    return torch.cat([to_image, to_text], dim=-1)
