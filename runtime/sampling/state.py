"""The moving averages between two steps: two buffers that take turns, so that no step copies them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

from emag_export.contract import DenoiserContract
from emag_export.engines.protocol import TORCH_DTYPES
from emag_export.shapes import evaluate

__all__ = ["EmaState", "StatePool"]


@dataclass(frozen=True, kw_only=True)
class EmaState:
    """State of one batch of images.

    A step reads ``average``, writes ``spare``, and :meth:`advanced` swaps them. So the state before a step
    is gone after the next one, and what a lent state held is gone once somebody else borrows its buffers.
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

    @classmethod
    def zeros_for(
        cls,
        contract: DenoiserContract,
        latents: Float[Tensor, "images channels height width"],
        embeds: Float[Tensor, "images text text_dim"],
    ) -> Self:
        """The state before the first accumulation of these images, on the device of their latents."""
        patch = contract.patch_size
        return cls.zeros(
            contract,
            images=latents.shape[0],
            grid=(latents.shape[2] // patch, latents.shape[3] // patch),
            text=embeds.shape[1],
            device=latents.device,
        )

    def advanced(self, delta: Float[Tensor, "images layers"]) -> Self:
        """The state after a step that wrote ``spare`` and measured ``delta``."""
        return type(self)(average=self.spare, spare=self.average, delta=delta)


class StatePool:
    """Lends states, so that runs of the same sizes find their averages at the same addresses.

    A CUDA graph is replayed at the addresses it was captured with: with new buffers in every run nothing
    could ever be replayed. Borrowers of one pair must use one stream, one after the other.

    Args:
        idle: Pairs kept while nobody uses them; beyond that the one unused for longest is freed. A pair of
            ``emag`` maps takes gigabytes.
    """

    def __init__(self, idle: int = 2) -> None:
        self._limit = idle
        self._idle: list[EmaState] = []
        self._lock = Lock()

    @contextmanager
    def lend(
        self,
        contract: DenoiserContract,
        latents: Float[Tensor, "images channels height width"],
        embeds: Float[Tensor, "images text text_dim"],
    ) -> Iterator[EmaState]:
        """A state for these images, all zeros, that nobody else has until the ``with`` is left.

        A generator may hold it across its ``yield``: it comes back when the generator ends or is closed.

        Args:
            contract: Of the graph that will use it.
            latents: x per image; sizes and device.
            embeds: Of their prompts; text tokens.
        """
        # Outside inference mode: a tensor born in it could not be zeroed by a borrower who is not.
        with torch.inference_mode(False):
            state = self._take(contract, latents, embeds)
        # The first accumulation is E + 1 (X - E): what the last run left would cost rounding, or be NaN.
        state.average.zero_()
        state.delta.zero_()
        try:
            yield state
        finally:
            with self._lock:
                self._idle = [*self._idle, state][-self._limit :] if self._limit else []

    def clear(self) -> None:
        """Free what is not lent."""
        with self._lock:
            self._idle = []

    def _take(self, contract: DenoiserContract, latents: Tensor, embeds: Tensor) -> EmaState:
        meta = torch.device("meta")
        wanted = EmaState.zeros_for(contract, latents.to(meta), embeds.to(meta)).average
        with self._lock:
            for index in reversed(range(len(self._idle))):
                kept = self._idle[index].average
                if (kept.shape, kept.dtype, kept.device) == (wanted.shape, wanted.dtype, latents.device):
                    return self._idle.pop(index)
        return EmaState.zeros_for(contract, latents, embeds)
