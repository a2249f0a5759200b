"""An engine that is a Python function: for tests of whatever drives engines, and for experiments."""

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from emag_export.contract import GraphSpec
from emag_export.engines.protocol import allocate_outputs, check_feeds

__all__ = ["FunctionEngine"]

Function = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""Inputs by name to some of the outputs by name."""


class FunctionEngine:
    """Checks what it is fed like every engine; outputs that the function does not give are left as they are.

    Args:
        spec: What it takes and gives.
        function: Computes outputs; None computes nothing.
        device: Where inputs must lie and outputs will.
        name: For people.
    """

    def __init__(
        self,
        spec: GraphSpec,
        function: Function | None = None,
        *,
        device: torch.device | str = "cpu",
        name: str = "function",
    ) -> None:
        self.spec = spec
        self.device = torch.device(device)
        self.name = name
        self._function = function

    def run(self, feeds: Mapping[str, Tensor], out: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """See :meth:`Engine.run`."""
        buffers = allocate_outputs(self.spec, check_feeds(self.spec, feeds, self.device), self.device, out)
        for name, value in ({} if self._function is None else self._function(feeds)).items():
            buffers[name].copy_(value)
        return buffers

    def close(self) -> None:
        """Nothing is held."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
