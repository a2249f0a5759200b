"""The moving averages between two steps: two buffers that take turns, so that no step copies them."""

from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

from emag_export.contract import DenoiserContract
from emag_export.engines.protocol import TORCH_DTYPES
from emag_export.shapes import evaluate

__all__ = ["EmaState"]


@dataclass(frozen=True, kw_only=True)
class EmaState:
    """State of one batch of images.

    A step reads ``average``, writes ``spare``, and :meth:`advanced` swaps them.
    """

    average: Float[Tensor, "images layers *state"]
    spare: Float[Tensor, "images layers *state"]
    delta: Float[Tensor, "images layers"]
    """Delta of the previous step: how far the live quantity was from its average."""

    @classmethod
    def zeros(
        cls,
        contract: DenoiserContract,
        *,
        images: int,
        grid: tuple[int, int],
        text: int,
        device: torch.device,
    ) -> Self:
        """The state before the first accumulation.

        Args:
            contract: Of the graph that will use it.
            images: Images in the batch.
            grid: Image tokens along height and width.
            text: Text tokens per row.
            device: Where the engine runs.
        """
        sizes = {"h": grid[0], "w": grid[1], "text": text}
        shape = (images, len(contract.blocks), *evaluate(contract.state_dims, sizes))
        dtype = TORCH_DTYPES[contract.state_dtype]
        return cls(
            average=torch.zeros(shape, dtype=dtype, device=device),
            spare=torch.zeros(shape, dtype=dtype, device=device),
            delta=torch.zeros(shape[:2], device=device),
        )

    def advanced(self, delta: Float[Tensor, "images layers"]) -> Self:
        """The state after a step that wrote ``spare`` and measured ``delta``."""
        return type(self)(average=self.spare, spare=self.average, delta=delta)
