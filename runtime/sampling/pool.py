"""Buffers of averages that runs borrow one after another."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from threading import Lock

import torch
from torch import Tensor

from emag_export.contract import DenoiserContract
from emag_export.engines.protocol import TORCH_DTYPES
from emag_export.runtime.sampling.state import Buffers, RunState, state_shape

__all__ = ["StatePool"]


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
        self._idle: list[Buffers] = []
        self._lock = Lock()

    @contextmanager
    def lend(
        self, contract: DenoiserContract, latents: Tensor, conditioning: Mapping[str, Tensor]
    ) -> Iterator[RunState]:
        """The state before the first step, in buffers that nobody else has until the ``with`` is left.

        A generator may hold it across its ``yield``: it comes back when the generator ends or is closed.

        Args:
            contract: Of the graph that will use it.
            latents: Initial noise.
            conditioning: With the prompt; only its shapes are looked at.
        """
        # Outside inference mode: a tensor born in it could not be zeroed by a borrower who is not.
        with torch.inference_mode(False):
            buffers = self._take(contract, latents, conditioning)
        # The first accumulation is E + 1 (X - E): what the last run left would cost rounding, or be NaN.
        buffers[0].zero_()
        try:
            yield RunState.start(contract, latents, conditioning, buffers=buffers)
        finally:
            with self._lock:
                self._idle = [*self._idle, buffers][-self._limit :] if self._limit else []

    def clear(self) -> None:
        """Free what is not lent."""
        with self._lock:
            self._idle = []

    def _take(
        self, contract: DenoiserContract, latents: Tensor, conditioning: Mapping[str, Tensor]
    ) -> Buffers:
        shape = state_shape(contract, latents, conditioning)
        dtype, device = TORCH_DTYPES[contract.state_dtype], latents.device
        with self._lock:
            for index in reversed(range(len(self._idle))):
                kept = self._idle[index][0]
                if (tuple(kept.shape), kept.dtype, kept.device) == (shape, dtype, device):
                    return self._idle.pop(index)
        return (
            torch.zeros(shape, dtype=dtype, device=device),
            torch.zeros(shape, dtype=dtype, device=device),
        )
