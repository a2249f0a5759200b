"""PyTorch eager: the very module that was exported, as the oracle of its graph."""

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from emag_export.contract import GraphSpec
from emag_export.engines.protocol import allocate_outputs, check_feeds

__all__ = ["EagerEngine"]


class EagerEngine:
    """Runs a module whose ``forward`` takes the inputs of ``spec`` by name and gives its outputs in order.

    Args:
        module: In eval mode, already on ``device``.
        spec: What it takes and gives.
        device: Where it runs.
    """

    def __init__(self, module: nn.Module, spec: GraphSpec, device: str = "cpu") -> None:
        self.module = module
        self.spec = spec
        self.device = torch.device(device)
        self.name = f"torch eager ({device})"

    def run(self, feeds: Mapping[str, Tensor], out: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """See :meth:`Engine.run`."""
        sizes = check_feeds(self.spec, feeds, self.device)
        buffers = self._buffers(sizes, out)
        with torch.inference_mode():
            results = self._call(feeds, sizes)
            results = results if isinstance(results, tuple) else (results,)
            outputs = {tensor.name: value for tensor, value in zip(self.spec.outputs, results, strict=True)}
            for name, buffer in buffers.items():
                outputs[name] = buffer.copy_(outputs[name])
        return outputs

    def _call(self, feeds: Mapping[str, Tensor], sizes: Mapping[str, int]) -> Any:
        """One tensor, or a tuple of them."""
        return self.module(**feeds)

    def _buffers(self, sizes: Mapping[str, int], out: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """What results are copied into: the caller's buffers, after checking them."""
        if not out:
            return {}
        buffers = allocate_outputs(self.spec, sizes, self.device, out)
        return {name: buffers[name] for name in out}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let the module go."""
        self.__dict__.pop("module", None)
