"""Which candidate block is perturbed, per image and step. Nothing here waits for the device."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from emag_export.errors import InputError

__all__ = ["Select", "always", "lagged_argmax", "scheduled"]

Select = Callable[[int, Float[Tensor, "images layers"]], Float[Tensor, "images layers"]]
"""(step index, Delta of the previous step) to a mask: 1 where the block is perturbed, else 0."""


def lagged_argmax(index: int, delta: Float[Tensor, "images layers"]) -> Float[Tensor, "images layers"]:
    """The block whose live quantity was furthest from its average in the previous step.

    Source:
        arXiv:2512.17303, eq. 13; per image, where the released code averages over the batch.
    """
    return torch.zeros_like(delta).scatter_(1, delta.argmax(dim=1, keepdim=True), 1.0)


def always(blocks: Sequence[int], candidates: Sequence[int]) -> Select:
    """The same blocks in every step, for every image.

    Args:
        blocks: Model block numbers to perturb.
        candidates: Candidate blocks of the graph.

    Raises:
        InputError: If a block is no candidate of this graph.
    """
    if unknown := [block for block in blocks if block not in candidates]:
        raise InputError(
            f"block {unknown[0]} is no candidate of this bundle, "
            f"which has {', '.join(map(str, candidates))}; choose among them, or build with --emag-layers"
        )
    row = tuple(float(candidate in blocks) for candidate in candidates)
    return lambda index, delta: _every_image(row, delta)


def scheduled(masks: Float[Tensor, "steps layers"]) -> Select:
    """A recorded choice, replayed for every image."""
    rows: list[list[float]] = masks.tolist()
    return lambda index, delta: _every_image(rows[index], delta)


def _every_image(
    row: Sequence[float], delta: Float[Tensor, "images layers"]
) -> Float[Tensor, "images layers"]:
    """The same row for every image, written where ``delta`` lies.

    A fill takes its number along with the kernel; a mask on the host would have to be copied in every step.
    """
    mask = torch.zeros_like(delta)
    for layer, value in enumerate(row):
        if value:
            mask[:, layer].fill_(value)
    return mask
