"""An engine whose calls somebody watches: to count, to time, to record."""

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from emag_export.contract import GraphSpec
from emag_export.engines.protocol import Engine

__all__ = ["ObservedEngine"]


class ObservedEngine:
    """Does what another engine does.

    Args:
        engine: Does the work; closing closes it.
        before: Told the inputs before every call.
        after: Told inputs and outputs after every call.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        before: Callable[[Mapping[str, Tensor]], None] | None = None,
        after: Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], None] | None = None,
    ) -> None:
        self.engine = engine
        self._before, self._after = before, after

    @property
    def name(self) -> str:
        """See :attr:`Engine.name`."""
        return self.engine.name

    @property
    def spec(self) -> GraphSpec:
        """See :attr:`Engine.spec`."""
        return self.engine.spec

    @property
    def device(self) -> torch.device:
        """See :attr:`Engine.device`."""
        return self.engine.device

    def run(self, feeds: Mapping[str, Tensor], out: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """See :meth:`Engine.run`."""
        if self._before is not None:
            self._before(feeds)
        outputs = self.engine.run(feeds, out)
        if self._after is not None:
            self._after(feeds, outputs)
        return outputs

    def close(self) -> None:
        """See :meth:`Engine.close`."""
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
