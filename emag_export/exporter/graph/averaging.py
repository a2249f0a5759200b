"""Hard negatives that average: what a candidate block's attention becomes, and the averages after it.

Everything here is traced into the graph, so it is written without branches on data: the average
starts (a = 1), continues (a = 1 - beta) or holds (a = 0), and a row is replaced (lambda = 1) or left
alone (lambda = 0), by arithmetic alone.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from emag_export.exporter.graph.tracking import Attended, Tracking, blend, per_row, with_image_queries
from emag_export.families.protocol import Heads, plain
from emag_export.kinds import Renorm

__all__ = ["ema_map", "ema_query", "full_rows", "image_block", "text_block"]

_ROW_SUM_FLOOR = 1e-12
_TILES = 8
"""At most so many parts of a map are computed one after another; each is that much smaller than a map."""


def ema_query(heads: Heads, tracking: Tracking) -> Attended:
    """Replace image queries by their moving average.

    Args:
        heads: Of all rows.
        tracking: State and controls of this block.

    Source:
        arXiv:2512.17303, eqs. 8-13; update order as in the released code.
    """
    before, step = _averages(tracking)
    live = heads.query.index_select(0, tracking.rows)[:, :, : heads.image_tokens]
    grid = before.shape[2:-1]
    average, change = _advance(before, live.unflatten(2, grid), step)
    query_tile = blend(live, average.flatten(2, -2).to(live.dtype), tracking.strength)
    return Attended(
        hidden=plain(replace(heads, query=with_image_queries(heads, tracking, query_tile))),
        average=[average.to(before.dtype)],
        delta=change.abs().flatten(1).mean(dim=1),
    )


def ema_map(
    heads: Heads,
    tracking: Tracking,
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
        region: The part of the rows that is averaged.

    Source:
        arXiv:2512.17303, eqs. 8-13; update order as in the released code.
    """
    image, (before, step) = heads.image_tokens, _averages(tracking)
    hidden = plain(heads)
    query, key, value, attended = (
        x.index_select(0, tracking.rows) for x in (heads.query, heads.key, heads.value, hidden)
    )
    query = query[:, :, :image] * heads.query.shape[-1] ** -0.5
    replaced, averages, deltas = [], [], []
    size = -(-query.shape[1] // _TILES)
    tiles = (x.split(size, dim=1) for x in (query, key, value, attended[:, :, :image], before))
    bias = None if heads.bias is None else heads.bias.index_select(0, tracking.rows)
    for query_tile, key_tile, value_tile, mixture, average in zip(*tiles, strict=True):
        scores = (query_tile @ key_tile.transpose(-2, -1)).float()
        rows = (scores if bias is None else scores + bias).softmax(dim=-1)
        live = region(rows, image)
        new, change = _advance(average, live, step)
        if region is full_rows:
            mixture = _remixed(mixture, average, value_tile, tracking.strength * (1 - step))
        else:
            used = tracking.strength[:, None, None, None] > 0
            blended = _splice(rows, blend(live, new, tracking.strength), region, image)
            rows = torch.where(used, _renormalise(blended, image, tracking.renorm), rows)
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


def _averages(tracking: Tracking) -> tuple[Tensor, Tensor]:
    assert tracking.average is not None, "kinds that average are given averages"
    assert tracking.step is not None, "and how far to move them"
    return tracking.average, tracking.step


def _remixed(live: Tensor, average: Tensor, value: Tensor, share: Tensor) -> Tensor:
    """((1 - lambda) X + lambda E_new) V, from X V and E_old V: neither map is needed a second time.

    E_new is (1 - a) E_old + a X, so the result is X V + lambda (1 - a) (E_old V - X V), where ``share`` is
    lambda (1 - a).
    """
    return live + per_row(share, live) * (average.to(value.dtype) @ value - live)


def _advance(average: Tensor, live: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """E + a (X - E) and X - E, both in float32 whatever E is kept in."""
    average = average.float()
    change = live.float() - average
    return average + per_row(step, change) * change, change


def full_rows(rows: Tensor, image: int | torch.SymInt) -> Tensor:
    """All of them."""
    return rows


def image_block(rows: Tensor, image: int | torch.SymInt) -> Tensor:
    """What falls on image tokens."""
    return rows[..., :image]


def text_block(rows: Tensor, image: int | torch.SymInt) -> Tensor:
    """What falls on text tokens."""
    return rows[..., image:]


def _splice(rows: Tensor, part: Tensor, region: Callable[..., Tensor], image: int | torch.SymInt) -> Tensor:
    """``rows`` with the given region exchanged for ``part``."""
    if region is full_rows:
        return part
    if region is image_block:
        return torch.cat([part, text_block(rows, image)], dim=-1)
    return torch.cat([image_block(rows, image), part], dim=-1)


def _renormalise(rows: Tensor, image: int | torch.SymInt, renorm: Renorm) -> Tensor:
    if renorm == Renorm.NONE:
        return rows
    if renorm == Renorm.ROW:
        return rows / rows.sum(dim=-1, keepdim=True).clamp_min(_ROW_SUM_FLOOR)
    to_image, to_text = image_block(rows, image), text_block(rows, image)
    missing = (1 - to_image.sum(dim=-1, keepdim=True)).clamp_min(0)
    to_text = to_text * (missing / to_text.sum(dim=-1, keepdim=True).clamp_min(_ROW_SUM_FLOOR))
    return torch.cat([to_image, to_text], dim=-1)
