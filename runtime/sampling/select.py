"""Which candidate block is perturbed, per image and step. Nothing here waits for the device."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from emag_export.errors import InputError

__all__ = [
    "Choice",
    "Choose",
    "always",
    "at_random",
    "block_mask",
    "by_delta",
    "lagged_argmax",
    "scheduled",
]

Choice = tuple[float, ...] | None
"""What is known before the run: 1 for every candidate block to perturb, else 0. None: chosen by Delta."""

Choose = Callable[[int], Choice]
"""Step index to the choice of that step."""


def by_delta(index: int) -> Choice:
    """Leave every step to :func:`lagged_argmax`.

    Args:
        index: Of the step, from 0.

    Examples:
        >>> from emag_export.runtime.sampling.select import by_delta
        >>> by_delta(0) is None
        True
    """
    return None


def lagged_argmax(delta: Float[Tensor, "images layers"]) -> Float[Tensor, "images layers"]:
    """A mask of the block whose live quantity was furthest from its average in the previous step.

    Args:
        delta: Of the previous step, mean of the absolute difference.

    Returns:
        1 at the largest, 0 elsewhere.

    Examples:
        >>> import torch
        >>> from emag_export.runtime.sampling.select import lagged_argmax
        >>> lagged_argmax(torch.tensor([[0.1, 0.4, 0.2]]))
        tensor([[0., 1., 0.]])

    Source:
        arXiv:2512.17303, eq. 13; per image, where the released code averages over the batch.
    """
    return torch.zeros_like(delta).scatter_(1, delta.argmax(dim=1, keepdim=True), 1.0)


def block_mask(
    choice: Choice, delta: Float[Tensor, "images layers"], strength: float
) -> Float[Tensor, "images layers"]:
    """Lambda of every candidate block, for images that share a choice.

    Args:
        choice: Of this step.
        delta: Of the previous step.
        strength: lambda of the blocks that are perturbed.

    Examples:
        >>> import torch
        >>> from emag_export.runtime.sampling.select import block_mask
        >>> block_mask((1.0, 0.0, 1.0), torch.zeros(1, 3), strength=0.5)
        tensor([[0.5000, 0.0000, 0.5000]])
    """
    mask = lagged_argmax(delta) if choice is None else torch.tensor(choice).to(delta).expand_as(delta)
    return mask * strength


def always(blocks: Sequence[int], candidates: Sequence[int]) -> Choose:
    """The same blocks in every step.

    Args:
        blocks: Model block numbers to perturb.
        candidates: Candidate blocks of the graph.

    Raises:
        InputError: If a block is no candidate of this graph.

    Examples:
        >>> from emag_export.runtime.sampling.select import always
        >>> choose = always([4], candidates=[3, 4, 5])
        >>> choose(0)
        (0.0, 1.0, 0.0)
    """
    if unknown := [block for block in blocks if block not in candidates]:
        raise InputError(
            f"block {unknown[0]} is no candidate, which are {', '.join(map(str, candidates))}; "
            "choose among them with `emag_blocks`, or other `emag_candidates`, which a bundle is built with"
        )
    row = tuple(float(candidate in blocks) for candidate in candidates)
    return lambda index: row


def at_random(count: int, candidates: Sequence[int], steps: int) -> Choose:
    """Other blocks in every step, drawn before the run; the same draw for every run of so many steps.

    Args:
        count: Blocks per step.
        candidates: Candidate blocks of the graph.
        steps: Of the run.

    Raises:
        InputError: If there are fewer candidates.

    Examples:
        >>> from emag_export.runtime.sampling.select import at_random
        >>> choose = at_random(2, candidates=[3, 4, 5], steps=28)
        >>> [sum(choose(index)) for index in range(3)]
        [2.0, 2.0, 2.0]

    Source:
        S²-Guidance, arXiv:2508.12880, algorithm 1: blocks are dropped at random, anew in every step.
    """
    if not 1 <= count <= len(candidates):
        raise InputError(
            f"`random_blocks` is {count}; there are {len(candidates)} candidate blocks: give 1 to "
            f"{len(candidates)}"
        )
    generator = torch.Generator().manual_seed(0)
    masks = []
    for _ in range(steps):
        drawn = torch.randperm(len(candidates), generator=generator)[:count].tolist()
        masks.append([float(position in drawn) for position in range(len(candidates))])
    return scheduled(masks)


def scheduled(masks: Sequence[Sequence[float]]) -> Choose:
    """A recorded choice, replayed.

    Args:
        masks: Per step, per candidate block.

    Examples:
        >>> from emag_export.runtime.sampling.select import scheduled
        >>> choose = scheduled([[1, 0, 0], [0, 0, 1]])
        >>> choose(1)
        (0.0, 0.0, 1.0)
    """
    rows = [tuple(map(float, row)) for row in masks]
    return lambda index: rows[index]
