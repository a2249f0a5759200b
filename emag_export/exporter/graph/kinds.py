"""Which function of the graph belongs to which kind of hard negative."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

from torch import Tensor

from emag_export.exporter.graph.averaging import ema_map, ema_query, full_rows, image_block, text_block
from emag_export.exporter.graph.stateless import blur_query, identity, skip
from emag_export.exporter.graph.tracking import Attended, Tracking
from emag_export.families.protocol import Heads
from emag_export.kinds import Variant

__all__ = ["ATTEND", "PASS"]

ATTEND: Mapping[Variant, Callable[[Heads, Tracking], Attended]] = MappingProxyType(
    {
        Variant.EMAG_Q: ema_query,
        Variant.EMAG: partial(ema_map, region=full_rows),
        Variant.EMAG_I: partial(ema_map, region=image_block),
        Variant.EMAG_T: partial(ema_map, region=text_block),
        Variant.IDENTITY: identity,
        Variant.BLUR_QUERY: blur_query,
    }
)
"""Attention of a candidate block, by kinds that change it."""

PASS: Mapping[Variant, Callable[[Tensor, Tensor, Tracking], Tensor]] = MappingProxyType({Variant.SKIP: skip})
"""(stream before a candidate block, behind it, controls) to the stream, by kinds that act on whole blocks."""
