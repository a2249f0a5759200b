"""Packing: which rows a call carries for images that may be in different phases."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from emag_export.runtime.sampling.plan import Phase

__all__ = ["PlacedRows", "RowLayout", "lay_out_rows", "place_rows"]


@dataclass(frozen=True, kw_only=True)
class RowLayout:
    """Where each image's predictions lie in one call.

    Trunk rows are ``[u…, c…]``, or ``[c…]`` where no unconditional prediction is needed. Branch rows
    end with one tracked row per image, in the order of the images, as the graph demands.
    """

    trunk_rows: int
    branch_rows: tuple[int, ...]
    """Trunk row of every branch row."""
    uncond: tuple[int, ...] | None
    """Branch row of each image's unconditional prediction."""
    cond: tuple[int, ...]
    perturbed: tuple[int, ...]
    """Equal to ``cond`` for images that are not being perturbed."""


def lay_out_rows(phases: Sequence[Phase], uncond: bool) -> RowLayout:
    """Pack the rows of images in these phases.

    Args:
        phases: One per image.
        uncond: Whether the guidance needs an unconditional row.
    """
    images = len(phases)
    cond_trunk = [images + i if uncond else i for i in range(images)]
    branch = list(range(images)) if uncond else []
    cond = {}
    for image, phase in enumerate(phases):
        if phase == Phase.GUIDE:
            cond[image] = len(branch)
            branch.append(cond_trunk[image])
    tracked = [len(branch) + image for image in range(images)]
    return RowLayout(
        trunk_rows=images * (1 + uncond),
        branch_rows=(*branch, *cond_trunk),
        uncond=tuple(range(images)) if uncond else None,
        cond=tuple(cond.get(image, tracked[image]) for image in range(images)),
        perturbed=tuple(tracked),
    )


@dataclass(frozen=True, kw_only=True)
class PlacedRows:
    """A layout as one device needs it.

    Consecutive rows are slices, which cost nothing; only conditional rows of images in mixed phases
    can be scattered and need an index tensor.
    """

    branch_rows: Int[Tensor, " rows"]
    """Trunk row of every branch row, int64."""
    uncond: slice | None
    cond: slice | Int[Tensor, " images"]
    perturbed: slice

    def split(
        self, velocity: Float[Tensor, "rows channels height width"]
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Unconditional, conditional and perturbed rows; views of ``velocity`` where they are slices.

        The last two are the same tensor where no image is perturbed.
        """
        uncond = None if self.uncond is None else velocity[self.uncond]
        cond = velocity[self.cond]
        alike = isinstance(self.cond, slice) and self.cond == self.perturbed
        return uncond, cond, cond if alike else velocity[self.perturbed]


@lru_cache(maxsize=256)
def place_rows(phases: tuple[Phase, ...], uncond: bool, device: torch.device) -> PlacedRows:
    """:func:`lay_out_rows` with its indices on ``device``.

    Remembered: a layout is copied to a device once. The host waits for that copy, so that whichever stream
    asks for the layout later may use it.

    Args:
        phases: One per image.
        uncond: Whether the guidance needs an unconditional row.
        device: Where the engine runs.
    """
    layout = lay_out_rows(phases, uncond)
    cond = _span(layout.cond)
    return PlacedRows(
        branch_rows=torch.tensor(layout.branch_rows).to(device),
        uncond=None if layout.uncond is None else slice(0, len(phases)),
        cond=torch.tensor(layout.cond).to(device) if cond is None else cond,
        perturbed=slice(layout.perturbed[0], layout.perturbed[-1] + 1),
    )


def _span(rows: tuple[int, ...]) -> slice | None:
    """The slice that selects these rows, None if they are not consecutive."""
    first, end = rows[0], rows[0] + len(rows)
    return slice(first, end) if rows == tuple(range(first, end)) else None
