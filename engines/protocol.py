"""What every engine does: tensors in, tensors out, one graph, one call, no memory."""

from collections.abc import Mapping
from types import TracebackType
from typing import Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from emag_export.contract import GraphSpec
from emag_export.errors import ContractError

__all__ = ["TORCH_DTYPES", "Engine", "allocate_outputs", "check_feeds"]

TORCH_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
}
"""Name of a dtype in a contract to PyTorch's."""


@runtime_checkable
class Engine(Protocol):
    """A graph made executable. State is an argument and a result; an engine keeps none between calls.

    On a GPU, inputs are read and outputs written in the order of PyTorch's current stream, and
    :meth:`run` need not wait for the device.
    """

    @property
    def name(self) -> str:
        """Backend and where it runs, for people: ``"onnxruntime (cpu)"``."""

    @property
    def spec(self) -> GraphSpec:
        """What it takes and gives."""

    @property
    def device(self) -> torch.device:
        """Where inputs must lie and outputs will lie."""

    def run(self, feeds: Mapping[str, Tensor], out: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Run the graph once.

        Args:
            feeds: Every input by name, on :attr:`device`.
            out: Buffers to write some of the outputs into. A buffer must not overlap an input; this is
                how two state buffers take turns without a copy.

        Returns:
            Every output by name. A tensor given in ``out`` is returned itself, the others are new.

        Raises:
            ContractError: If an input does not fit the contract.
            EngineError: If the backend fails.
        """

    def close(self) -> None:
        """Free what it holds; closing twice does nothing. Leaving a ``with`` closes."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def check_feeds(spec: GraphSpec, feeds: Mapping[str, Tensor], device: torch.device) -> dict[str, int]:
    """Sizes of the named dimensions, after checking names, dtypes, shapes and device.

    Args:
        spec: Of the graph.
        feeds: What it is fed, by name.
        device: Where the engine runs.

    Raises:
        ContractError: Saying what was got, what was wanted, and what to do.
    """
    sizes = spec.bind({name: tuple(tensor.shape) for name, tensor in feeds.items()})
    for tensor in spec.inputs:
        fed = feeds[tensor.name]
        if fed.dtype is not TORCH_DTYPES[tensor.dtype]:
            raise ContractError(
                f"{tensor.name} has dtype {str(fed.dtype).removeprefix('torch.')}, {spec.name} takes "
                f"{tensor.dtype}; convert it with .to(torch.{tensor.dtype})"
            )
        # A device without a number stands for whichever one is current.
        numbers = {fed.device.index, device.index} - {None}
        if fed.device.type != device.type or len(numbers) > 1:
            raise ContractError(
                f"{tensor.name} lies on {fed.device}, this engine runs on {device}; "
                f"move it with .to('{device}')"
            )
    return sizes


def allocate_outputs(
    spec: GraphSpec, sizes: Mapping[str, int], device: torch.device, out: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """A buffer for every output: the caller's where given and fitting, otherwise a new one.

    Args:
        spec: Of the graph.
        sizes: Of every named dimension in this call.
        device: Where the engine runs.
        out: Buffers of the caller, by name of the output.

    Raises:
        ContractError: If a given buffer has the wrong name, shape, dtype or layout.
    """
    given = dict(out or {})
    buffers = {}
    for tensor, shape in zip(spec.outputs, spec.output_shapes(sizes).values(), strict=True):
        dtype = TORCH_DTYPES[tensor.dtype]
        buffer = given.pop(tensor.name, None)
        if buffer is None:
            buffer = torch.empty(shape, dtype=dtype, device=device)
        elif tuple(buffer.shape) != shape or buffer.dtype is not dtype or not buffer.is_contiguous():
            raise ContractError(
                f"the buffer for {tensor.name} is {list(buffer.shape)} {buffer.dtype}, this call writes "
                f"contiguous {list(shape)} {dtype}; allocate it for the same sizes"
            )
        buffers[tensor.name] = buffer
    if given:
        raise ContractError(f"{spec.name} has no output {', '.join(given)}; it gives {', '.join(buffers)}")
    return buffers
