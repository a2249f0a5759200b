"""What changes from step to step: tensors with an axis of images, none of them ever absent."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

from emag_export.contract import DenoiserContract
from emag_export.engines.protocol import TORCH_DTYPES
from emag_export.errors import ContractError
from emag_export.runtime.sampling.rows import pick
from emag_export.shapes import evaluate
from emag_export.sizes import run_sizes

__all__ = ["Buffers", "RunState", "state_shape"]

Buffers = tuple[Tensor, Tensor]
"""Two buffers of averages that take turns, so that no step copies them."""


@dataclass(frozen=True, kw_only=True)
class RunState:
    """State of some images between two steps.

    A step reads ``average`` and writes ``spare``; in the state that follows the two have changed places. So
    the averages of a state are gone after the next step but one: what is needed for longer must be cloned.
    """

    latents: Float[Tensor, "images channels *sides"]
    """x, float32."""
    average: Float[Tensor, "images layers *state"]
    """E of every candidate block, in the precision of ``contract.state_dtype``; empty for kinds of negatives
    that keep nothing."""
    spare: Float[Tensor, "images layers *state"]
    """Where the next step writes E."""
    delta: Float[Tensor, "images layers"]
    """Delta of the previous step: how far the live quantity was from its average."""
    momentum: Float[Tensor, "images channels *sides"]
    """M of APG; zeros for any other guidance."""

    @classmethod
    def start(
        cls,
        contract: DenoiserContract,
        latents: Float[Tensor, "images channels *sides"],
        conditioning: Mapping[str, Tensor],
        *,
        buffers: Buffers | None = None,
    ) -> Self:
        """The state before the first step.

        Args:
            contract: Of the graph that will use it.
            latents: Initial noise, on the engine's device.
            conditioning: With the prompt; only its shapes are looked at.
            buffers: For the averages, both of :func:`state_shape`; the first must be zeros. None makes new
                ones.

        Raises:
            ContractError: If the tensors do not fit the contract.
        """
        if buffers is None:
            shape = state_shape(contract, latents, conditioning)
            dtype = TORCH_DTYPES[contract.state_dtype]
            buffers = (
                torch.zeros(shape, dtype=dtype, device=latents.device),
                torch.zeros(shape, dtype=dtype, device=latents.device),
            )
        latents = latents.float()
        return cls(
            latents=latents,
            average=buffers[0],
            spare=buffers[1],
            delta=torch.zeros(latents.shape[0], len(contract.blocks), device=latents.device),
            momentum=torch.zeros_like(latents),
        )

    @property
    def images(self) -> int:
        """Number of images."""
        return self.latents.shape[0]

    def select(self, images: Sequence[int]) -> Self:
        """A copy of the state of some images, in this order.

        Args:
            images: Their places, from 0.
        """
        average = pick(self.average, images)
        return type(self)(
            latents=pick(self.latents, images),
            average=average,
            spare=torch.empty_like(average),
            delta=pick(self.delta, images),
            momentum=pick(self.momentum, images),
        )

    @classmethod
    def cat(cls, states: Sequence["RunState"]) -> Self:
        """A copy of the states of several groups of images behind each other.

        Args:
            states: At least one.

        Raises:
            ContractError: If the sizes of their tensors differ; group images by size and text length.
        """
        sizes = {(state.latents.shape[1:], state.average.shape[1:]) for state in states}
        if len(sizes) > 1:
            raise ContractError(
                "these images differ in size or text length; one call takes images of one size: group them"
            )
        average = torch.cat([state.average for state in states])
        return cls(
            latents=torch.cat([state.latents for state in states]),
            average=average,
            spare=torch.empty_like(average),
            delta=torch.cat([state.delta for state in states]),
            momentum=torch.cat([state.momentum for state in states]),
        )


def state_shape(
    contract: DenoiserContract,
    latents: Float[Tensor, "images channels *sides"],
    conditioning: Mapping[str, Tensor],
) -> tuple[int, ...]:
    """Shape of the averages of these images.

    Args:
        contract: Of the graph that will use them.
        latents: x per image.
        conditioning: Of the images.

    Raises:
        ContractError: If the tensors do not fit the contract.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in conditioning.items()}
    sizes = run_sizes(contract, {"latents": tuple(latents.shape), **shapes})
    return (latents.shape[0], len(contract.blocks), *evaluate(contract.state_dims, sizes))
