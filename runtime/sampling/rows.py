"""Packing: which rows a call carries, for images that may differ in phase and in guidance."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from emag_export.runtime.device import to_device
from emag_export.runtime.guidance.rules import Predictions
from emag_export.runtime.sampling.plan import Phase

__all__ = ["PlacedRows", "RowLayout", "lay_out_rows", "pick", "place_rows"]


@dataclass(frozen=True, kw_only=True)
class RowLayout:
    """Where each image's predictions lie in one call.

    Trunk rows are ``[u…, c…]``, with a ``u`` for every image that needs an unconditional prediction. Branch
    rows end with one tracked row per image, in the order of the images, as the graph demands.
    """

    trunk_images: tuple[int, ...]
    """Image of every trunk row."""
    branch_rows: tuple[int, ...]
    """Trunk row of every branch row."""
    uncond: tuple[int, ...] | None
    """Branch row of each image's unconditional prediction, its conditional one where it has none; None where
    no image has one."""
    cond: tuple[int, ...]
    perturbed: tuple[int, ...]
    """Equal to ``cond`` for images that are not being perturbed."""


def lay_out_rows(phases: Sequence[Phase], uncond: Sequence[bool]) -> RowLayout:
    """Pack the rows of some images.

    Args:
        phases: One per image.
        uncond: Per image, whether its guidance needs an unconditional row.
    """
    images = len(phases)
    unconditional = [image for image in range(images) if uncond[image]]
    cond_trunk = [len(unconditional) + image for image in range(images)]
    branch = list(range(len(unconditional)))
    guided = {}
    for image, phase in enumerate(phases):
        if phase == Phase.GUIDE:
            guided[image] = len(branch)
            branch.append(cond_trunk[image])
    tracked = [len(branch) + image for image in range(images)]
    cond = tuple(guided.get(image, tracked[image]) for image in range(images))
    first = {image: row for row, image in enumerate(unconditional)}
    return RowLayout(
        trunk_images=(*unconditional, *range(images)),
        branch_rows=(*branch, *cond_trunk),
        uncond=tuple(first.get(image, cond[image]) for image in range(images)) if unconditional else None,
        cond=cond,
        perturbed=tuple(tracked),
    )


@dataclass(frozen=True, kw_only=True)
class PlacedRows:
    """A layout as one device needs it.

    Consecutive rows are slices, which cost nothing; only rows of images that differ from each other can be
    scattered and need an index tensor.
    """

    trunk_images: Int[Tensor, " trunk_rows"]
    """Image of every trunk row, int64."""
    branch_rows: Int[Tensor, " rows"]
    """Trunk row of every branch row, int64."""
    uncond_images: slice | Int[Tensor, " unconditional"] | None
    """Images that have an unconditional row."""
    uncond: slice | Int[Tensor, " images"] | None
    cond: slice | Int[Tensor, " images"]
    perturbed: slice

    def split(self, prediction: Float[Tensor, "rows channels *sides"]) -> Predictions:
        """Predictions per image; views where rows are consecutive.

        Args:
            prediction: ``noise_pred`` of the call, float32.
        """
        cond = _taken(prediction, self.cond)
        alike = isinstance(self.cond, slice) and self.cond == self.perturbed
        return Predictions(
            uncond=None if self.uncond is None else _taken(prediction, self.uncond),
            cond=cond,
            perturbed=cond if alike else prediction[self.perturbed],
        )


@lru_cache(maxsize=256)
def place_rows(phases: tuple[Phase, ...], uncond: tuple[bool, ...], device: torch.device) -> PlacedRows:
    """:func:`lay_out_rows` with its indices on ``device``.

    Remembered: a layout is copied to a device once. The host waits for that copy, so that whichever stream
    asks for the layout later may use it.

    Args:
        phases: One per image.
        uncond: Per image, whether its guidance needs an unconditional row.
        device: Where the engine runs.
    """
    layout = lay_out_rows(phases, uncond)
    unconditional = layout.trunk_images[: -len(phases)]

    def placed(rows: tuple[int, ...]) -> slice | Tensor:
        return _span(rows) or torch.tensor(rows).to(device)

    return PlacedRows(
        trunk_images=torch.tensor(layout.trunk_images).to(device),
        branch_rows=torch.tensor(layout.branch_rows).to(device),
        uncond_images=placed(unconditional) if unconditional else None,
        uncond=None if layout.uncond is None else placed(layout.uncond),
        cond=placed(layout.cond),
        perturbed=slice(layout.perturbed[0], layout.perturbed[-1] + 1),
    )


def _span(rows: tuple[int, ...]) -> slice | None:
    """The slice that selects these rows, None if they are not consecutive."""
    first, end = rows[0], rows[0] + len(rows)
    return slice(first, end) if rows == tuple(range(first, end)) else None


def _taken(tensor: Tensor, rows: slice | Tensor) -> Tensor:
    return tensor[rows] if isinstance(rows, slice) else tensor.index_select(0, rows)


def pick(tensor: Tensor, images: Sequence[int]) -> Tensor:
    """A copy of some rows of a tensor, in this order, without waiting for its device.

    Args:
        tensor: Rows first.
        images: Rows to copy, from 0.
    """
    span = _span(tuple(images)) if images else None
    if span is not None:
        return tensor[span].clone()
    return tensor.index_select(0, to_device(torch.tensor(images, dtype=torch.int64), tensor.device))
