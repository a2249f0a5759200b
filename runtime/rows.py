"""Packing: which rows a call carries for images that may be in different phases."""

from collections.abc import Sequence
from dataclasses import dataclass

from emag_export.runtime.plan import Phase

__all__ = ["RowLayout", "lay_out_rows"]


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
        if phase is Phase.GUIDE:
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
