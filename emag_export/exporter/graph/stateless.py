"""Hard negatives that keep nothing: attention of the perturbed row is cut or blurred, or its block left out.

Traced into the graph like those that average, so lambda is arithmetic and not a branch. A block that is
skipped is therefore computed and its input put back: which blocks are skipped is decided at every call.
"""

from dataclasses import replace

import torch
from torch import Tensor

from emag_export.exporter.graph.tracking import Attended, Tracking, blend, with_image_queries
from emag_export.families.protocol import Heads, plain

__all__ = ["blur_query", "identity", "skip"]


def identity(heads: Heads, tracking: Tracking) -> Attended:
    """Let every image token attend to itself alone; text attends as before.

    Args:
        heads: Of all rows.
        tracking: Controls of this block.

    Source:
        Perturbed-attention guidance, arXiv:2403.17377, eq. 13: the map becomes the identity matrix, so the
        output of a token is its own value.
    """
    image, hidden = heads.image_tokens, plain(heads)
    attended, value = (x.index_select(0, tracking.rows) for x in (hidden, heads.value))
    mixed = blend(attended[:, :, :image], value[:, :, :image], tracking.strength)
    tracked = torch.cat([mixed, attended[:, :, image:]], dim=2)
    return Attended(hidden=hidden.index_copy(0, tracking.rows, tracked))


def blur_query(heads: Heads, tracking: Tracking) -> Attended:
    """Blur image queries over height and width, channel by channel.

    Args:
        heads: Of all rows.
        tracking: Controls of this block, and a blur matrix per side and tracked row.

    Source:
        Smoothed energy guidance, arXiv:2408.00760, section 4.2; a Gaussian blur is separable, so it is a
        matrix from the left and one from the right.
    """
    live = heads.query.index_select(0, tracking.rows)[:, :, : heads.image_tokens]
    over_height, over_width = (matrix.to(live.dtype)[:, None] for matrix in tracking.blur)
    grid = live.unflatten(2, (over_height.shape[-1], over_width.shape[-1]))
    # tracked heads h w d: along w for every line, then along h with the rest of a line as one axis.
    lines = over_width[:, None] @ grid
    blurred = (over_height @ lines.flatten(3)).unflatten(3, lines.shape[3:]).flatten(2, 3)
    query = with_image_queries(heads, tracking, blend(live, blurred, tracking.strength))
    return Attended(hidden=plain(replace(heads, query=query)))


def skip(before: Tensor, after: Tensor, tracking: Tracking) -> Tensor:
    """Let the tracked rows leave a block as they came.

    Args:
        before: One stream of the block, all rows.
        after: The same stream behind the block.
        tracking: Controls of this block.

    Source:
        Skip-layer guidance; arXiv:2411.18664, section 3 (STG, residual skip).
    """
    live, kept = after.index_select(0, tracking.rows), before.index_select(0, tracking.rows)
    return after.index_copy(0, tracking.rows, blend(live, kept, tracking.strength))
