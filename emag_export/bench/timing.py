"""How long steps take on the host's clock, and how much of that is the engine's."""

import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeVar

import torch
from torch import Tensor

from emag_export.contract import GraphSpec
from emag_export.engines.protocol import Engine
from emag_export.runtime.sampling.plan import Phase

__all__ = ["StepTime", "TimedEngine", "timed_steps", "wait_for"]

Step = TypeVar("Step")


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """One step of one run."""

    phase: Phase
    seconds: float
    engine: float | None = None
    """Seconds of them spent in the engine's calls; None where loop and model are not told apart."""


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done what was asked of it; what the host has asked for is no measure of time."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class TimedEngine:
    """An engine that adds up the seconds of its calls.

    On a GPU every call is waited for. So a step takes a little longer than in a run that nobody measures,
    where the host prepares the next call meanwhile.

    Args:
        engine: Does the work; whoever opened it closes it.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.seconds = 0.0
        self.calls = 0

    @property
    def name(self) -> str:
        """See :attr:`Engine.name`."""
        return self._engine.name

    @property
    def spec(self) -> GraphSpec:
        """See :attr:`Engine.spec`."""
        return self._engine.spec

    @property
    def device(self) -> torch.device:
        """See :attr:`Engine.device`."""
        return self._engine.device

    def run(self, feeds: Mapping[str, Tensor], out: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """See :meth:`Engine.run`."""
        wait_for(self.device)
        begin = time.perf_counter()
        outputs = self._engine.run(feeds, out)
        wait_for(self.device)
        self.seconds += time.perf_counter() - begin
        self.calls += 1
        return outputs

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


def timed_steps(
    steps: Iterator[Step],
    phase_of: Callable[[Step], Phase],
    device: torch.device,
    engine: TimedEngine | None = None,
) -> Generator[StepTime, None, None]:
    """Run a generator of steps, and say of each how long it took.

    Time that passes between two steps is not counted, so several runs can take turns.

    Args:
        steps: Of :func:`~emag_export.runtime.loop.denoise` or the reference.
        phase_of: Phase of a finished step.
        device: Waited for after every step.
        engine: That the steps call, to tell its share apart.
    """
    while True:
        before = 0.0 if engine is None else engine.seconds
        begin = time.perf_counter()
        step = next(steps, None)
        if step is None:
            return
        wait_for(device)
        seconds = time.perf_counter() - begin
        yield StepTime(
            phase=phase_of(step),
            seconds=seconds,
            engine=None if engine is None else engine.seconds - before,
        )
