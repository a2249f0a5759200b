"""Put weights into a model that was made without them: read now, or left unread with a place kept for them.

A graph can be traced without its large weights, because tracing looks at shapes. But PyTorch, ONNX and the
passes over a graph want tensors. So an unread weight is a tensor in a file in memory that has no pages yet:
it takes address space and nothing else, views and transposes of it cost nothing, and its address says which
weight it is. Had anything looked at its numbers, which are not there, the file would have pages: that is
checked, see :meth:`Reserved.check`.
"""

import mmap
import os
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from emag_export.errors import ExportError
from emag_export.families.unread import Unread, identity_of, kept_in_float32

__all__ = ["READ_AT_ONCE", "Change", "Reserved", "place"]

READ_AT_ONCE = 1 << 13
"""Weights of as many numbers are read before the trace, and so are all vectors: the passes over a graph fold
constants of that size, and look at biases. Of larger ones they fold transposes alone, which read nothing."""

_ALIGNMENT = 64
"""Bytes, that of PyTorch's own allocator."""

Change = Callable[[str, Tensor], Tensor]
"""(name, weight) to what it becomes: a LoRA that is merged."""


def _unchanged(name: str, weight: Tensor) -> Tensor:
    return weight


@dataclass(frozen=True, kw_only=True)
class _Entry:
    name: str
    address: int
    tensor: Tensor
    read: Callable[[], Tensor]


class Reserved:
    """Address space for the unread weights of one model.

    Args:
        size: Bytes, all weights together with their alignment.
    """

    def __init__(self, size: int = 0) -> None:
        if hasattr(os, "memfd_create"):
            descriptor = os.memfd_create("unread weights")
        else:
            with tempfile.TemporaryFile(buffering=0) as file:
                descriptor = os.dup(file.fileno())
        size = max(size, mmap.PAGESIZE)
        os.ftruncate(descriptor, size)
        self._descriptor = descriptor
        self._memory = mmap.mmap(descriptor, size)
        self._used = 0
        self._entries: list[_Entry] = []
        self._start = np.frombuffer(self._memory, np.uint8).ctypes.data

    def __del__(self) -> None:
        os.close(self._descriptor)

    def tensor(
        self, name: str, shape: Sequence[int], dtype: torch.dtype, read: Callable[[], Tensor]
    ) -> Tensor:
        """A tensor without numbers.

        Args:
            name: Of the weight, for errors.
            shape: Of the weight.
            dtype: Of the weight.
            read: Makes the weight itself, of this shape and dtype.
        """
        count = torch.Size(shape).numel()
        tensor = torch.frombuffer(self._memory, dtype=dtype, count=count, offset=self._used).view(*shape)
        self._entries.append(_Entry(name=name, address=self._start + self._used, tensor=tensor, read=read))
        self._used += aligned(count * dtype.itemsize)
        return tensor

    def reader(self, array: Any) -> Callable[[], Tensor] | None:
        """What makes the numbers of a numpy array that is an unread weight, or a view of one.

        Args:
            array: Any; looked at is where it lies, not what it holds.

        Returns:
            A function without arguments to a contiguous tensor; None for an array with numbers of its own.
        """
        address = array.__array_interface__["data"][0] - self._start
        if not 0 <= address < self._used:
            return None
        entry = self._entry(address + self._start)
        width = entry.tensor.element_size()
        offset = (address + self._start - entry.address) // width
        strides = [stride // width for stride in array.strides]
        return lambda: entry.read().contiguous().as_strided(array.shape, strides, offset).contiguous()

    def _entry(self, address: int) -> _Entry:
        return self._entries[bisect_right(self._entries, address, key=lambda entry: entry.address) - 1]

    def check(self) -> None:
        """Make sure that nothing has looked at the numbers of an unread weight, which are not there.

        Raises:
            ExportError: If something has; what it made of them would be wrong.
        """
        if os.fstat(self._descriptor).st_blocks:
            entry = self._entry(self._start + os.lseek(self._descriptor, 0, os.SEEK_DATA))
            raise ExportError(
                f"the export looked at {entry.name} {tuple(entry.tensor.shape)}, or a weight near it, before "
                "it was read; please report this model, and the versions of PyTorch and onnxscript"
            )


def aligned(size: int) -> int:
    """Bytes that a weight of this size takes."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def place(
    unread: Unread, dtype: torch.dtype, change: Change = _unchanged, *, read_at_once: int | None = None
) -> Reserved:
    """Give the model its weights, in the precision that its library would load them in.

    Args:
        unread: Its model is changed.
        dtype: Of the weights, but for those that the model keeps in float32.
        change: Applied to every weight once it has its precision.
        read_at_once: Weights of more numbers stay unread, but for vectors; None reads all.

    Returns:
        The place of the unread ones. A weight's attribute ``read_stored`` reads it.
    """
    model, kept = unread.model, kept_in_float32(unread.model, dtype)
    persistent = model.state_dict()
    dtypes = {
        name: tensor.dtype if not tensor.is_floating_point() else torch.float32 if kept(name) else dtype
        for name, tensor in persistent.items()
    }
    later = {
        name
        for name, tensor in persistent.items()
        if tensor.is_meta and read_at_once is not None and tensor.ndim > 1 and tensor.numel() > read_at_once
    }
    reserved = Reserved(sum(aligned(persistent[n].numel() * dtypes[n].itemsize) for n in later))
    placed: dict[Any, Tensor] = {}
    for name, tensor in persistent.items():
        one = identity_of(tensor)

        def read(name: str = name) -> Tensor:
            return change(name, unread.read(name).to(dtypes[name]))

        if one not in placed and name in later:
            placed[one] = nn.Parameter(reserved.tensor(name, tensor.shape, dtypes[name], read), False)
            placed[one].read_stored = read  # type: ignore[attr-defined]
        elif one not in placed:
            numbers = read().clone(memory_format=torch.contiguous_format)  # not a page of a mapped file
            placed[one] = nn.Parameter(numbers, False) if tensor.is_meta else numbers
        _set(model, name, placed[one])
    return reserved


def _set(model: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    table: Mapping[str, Any] = module._parameters if leaf in module._parameters else module._buffers
    assert leaf in table, "names come from the model's own state"
    setattr(module, leaf, value)
