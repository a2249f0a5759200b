"""One stream and one block of device memory for engines that never run at the same time."""

from math import prod

import torch
from torch import Tensor

__all__ = ["Workspace", "empty_aligned", "is_aligned"]

_ALIGNMENT = 256
"""Bytes; what TensorRT asks of all addresses. PyTorch allocates at such, but a view may begin anywhere."""


def is_aligned(address: int) -> bool:
    """Whether TensorRT takes this address."""
    return address % _ALIGNMENT == 0


def empty_aligned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A contiguous tensor whose address TensorRT takes."""
    size = prod(shape) * dtype.itemsize
    block = torch.empty(size + _ALIGNMENT, dtype=torch.uint8, device=device)
    begin = -block.data_ptr() % _ALIGNMENT
    return block[begin : begin + size].view(dtype).view(shape)


class Workspace:
    """Shared by the engines of one pipeline, which run one after the other on its stream.

    The block grows to the largest need seen. When it moves, :attr:`generation` changes: CUDA graphs that
    were captured with the old address must not be replayed.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.generation = 0
        self._block: Tensor | None = None

    def reserve(self, size: int) -> tuple[int, int]:
        """Address and size of at least ``size`` bytes, valid until a later call asks for more."""
        if self._block is None or self._block.numel() - _ALIGNMENT < size:
            self._block = None  # free first: two of the largest blocks may not fit
            self._block = torch.empty(size + _ALIGNMENT, dtype=torch.uint8, device=self.device)
            self.generation += 1
        address = -(-self._block.data_ptr() // _ALIGNMENT) * _ALIGNMENT
        return address, self._block.numel() - (address - self._block.data_ptr())

    def begin(self) -> None:
        """Let the stream wait for what the caller has enqueued; the host does not wait."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))

    def end(self) -> None:
        """Let the caller's stream wait for ours; the host does not wait."""
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
