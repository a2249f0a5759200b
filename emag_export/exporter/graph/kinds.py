"""Hard negatives: what becomes of a candidate block's attention, one function a kind.

Everything here is traced into the graph, so it is written without branches on data: the average
starts (a = 1), continues (a = 1 - beta) or holds (a = 0), and a row is replaced (lambda = 1) or left
alone (lambda = 0), by arithmetic alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType

import torch
from jaxtyping import Float, Int
from torch import Tensor

from emag_export.contract import Renorm, Variant
from emag_export.families.protocol import Heads, plain

__all__ = ["ATTEND", "Attended", "Tracking"]

_ROW_SUM_FLOOR = 1e-12
_TILES = 8
"""At most so many parts of a map are computed one after another; each is that much smaller than a map."""


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
class Attended:
    """Result of one candidate block's attention."""

    hidden: Float[Tensor, "rows heads tokens head_dim"]
    """Before the output projection."""
    average: Sequence[Float[Tensor, " tracked part *state"]]
    """The new averages, a few heads each: put together only where they leave the graph."""
    delta: Float[Tensor, " tracked"]
    """mean |E_old - X| per tracked row."""


def ema_query(heads: Heads, tracking: Tracking, renorm: Renorm) -> Attended:
    """Replace image queries by their moving average.

    Args:
        heads: Of all rows.
        tracking: State and controls of this block.
        renorm: Not used: queries have no sum.

    Source:
        arXiv:2512.17303, eqs. 8-13; update order as in the released code.
    """
    query, image = heads.query, heads.image_tokens
    live = query.index_select(0, tracking.rows)[:, :, :image]
    grid = tracking.average.shape[2:-1]
    average, change = _advance(tracking.average, live.unflatten(2, grid), tracking.step)
    query_tile = _blend(live, average.flatten(2, -2).to(live.dtype), tracking.strength)
    text = query.index_select(0, tracking.rows)[:, :, image:]
    query = query.index_copy(0, tracking.rows, torch.cat([query_tile, text], dim=2))
    return Attended(
        hidden=plain(replace(heads, query=query)),
        average=[average.to(tracking.average.dtype)],
        delta=change.abs().flatten(1).mean(dim=1),
    )


def ema_map(
    heads: Heads,
    tracking: Tracking,
    renorm: Renorm,
    *,
    region: Callable[[Tensor, int | torch.SymInt], Tensor],
) -> Attended:
    """Replace softmax rows of the image queries, or a block of them, by their moving average.

    Fused attention of all rows comes first, then the maps of the tracked ones, some heads at a time. A map is
    as large as the state of its block, so it is never there as a whole: every tile is used up before the next
    one is computed.

    Args:
        heads: Of all rows.
        tracking: State and controls of this block.
        renorm: How a partly replaced row is brought back to sum one.
        region: The part of the rows that is averaged.

    Source:
        arXiv:2512.17303, eqs. 8-13; update order as in the released code.
    """
    image = heads.image_tokens
    hidden = plain(heads)
    query, key, value, attended = (
        x.index_select(0, tracking.rows) for x in (heads.query, heads.key, heads.value, hidden)
    )
    query = query[:, :, :image] * heads.query.shape[-1] ** -0.5
    replaced, averages, deltas = [], [], []
    size = -(-query.shape[1] // _TILES)
    tiles = (x.split(size, dim=1) for x in (query, key, value, attended[:, :, :image], tracking.average))
    bias = None if heads.bias is None else heads.bias.index_select(0, tracking.rows)
    for query_tile, key_tile, value_tile, mixture, average in zip(*tiles, strict=True):
        scores = (query_tile @ key_tile.transpose(-2, -1)).float()
        rows = (scores if bias is None else scores + bias).softmax(dim=-1)
        live = region(rows, image)
        new, change = _advance(average, live, tracking.step)
        if region is _full_rows:
            mixture = _remixed(mixture, average, value_tile, tracking)
        else:
            used = tracking.strength[:, None, None, None] > 0
            blended = _splice(rows, _blend(live, new, tracking.strength), region, image)
            rows = torch.where(used, _renormalise(blended, image, renorm), rows)
            mixture = rows.to(value_tile.dtype) @ value_tile
        replaced.append(mixture)
        averages.append(new.to(average.dtype))
        # Row by row: one reduction over both axes takes TensorRT-RTX twice the scratch memory.
        deltas.append(change.abs().mean(dim=-1).mean(dim=-1))
    tracked = torch.cat([torch.cat(replaced, dim=1), attended[:, :, image:]], dim=2)
    return Attended(
        hidden=hidden.index_copy(0, tracking.rows, tracked),
        average=averages,
        delta=torch.cat(deltas, dim=1).mean(dim=1),
    )


def _remixed(live: Tensor, average: Tensor, value: Tensor, tracking: Tracking) -> Tensor:
    """((1 - lambda) X + lambda E_new) V, from X V and E_old V: neither map is needed a second time.

    E_new is (1 - a) E_old + a X, so the result is X V + lambda (1 - a) (E_old V - X V).
    """
    share = _per_row(tracking.strength * (1 - tracking.step), live)
    return live + share * (average.to(value.dtype) @ value - live)


def _advance(average: Tensor, live: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """E + a (X - E) and X - E, both in float32 whatever E is kept in."""
    average = average.float()
    change = live.float() - average
    return average + _per_row(step, change) * change, change


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


ATTEND: Mapping[Variant, Callable[[Heads, Tracking, Renorm], Attended]] = MappingProxyType(
    {
        Variant.EMAG_Q: ema_query,
        Variant.EMAG: partial(ema_map, region=_full_rows),
        Variant.EMAG_I: partial(ema_map, region=_image_block),
        Variant.EMAG_T: partial(ema_map, region=_text_block),
    }
)
"""Attention of a candidate block, by kind."""


def _splice(rows: Tensor, part: Tensor, region: Callable[..., Tensor], image: int | torch.SymInt) -> Tensor:
    """``rows`` with the given region exchanged for ``part``."""
    if region is _full_rows:
        return part
    if region is _image_block:
        return torch.cat([part, _text_block(rows, image)], dim=-1)
    return torch.cat([_image_block(rows, image), part], dim=-1)


def _renormalise(rows: Tensor, image: int | torch.SymInt, renorm: Renorm) -> Tensor:
    if renorm == Renorm.NONE:
        return rows
    if renorm == Renorm.ROW:
        return rows / rows.sum(dim=-1, keepdim=True).clamp_min(_ROW_SUM_FLOOR)
    to_image, to_text = _image_block(rows, image), _text_block(rows, image)
    missing = (1 - to_image.sum(dim=-1, keepdim=True)).clamp_min(0)
    to_text = to_text * (missing / to_text.sum(dim=-1, keepdim=True).clamp_min(_ROW_SUM_FLOOR))
    return torch.cat([to_image, to_text], dim=-1)
