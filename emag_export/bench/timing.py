"""How long steps take on the host's clock, and how much of that is the engine's."""

import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from emag_export.engines.observed import ObservedEngine
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


class TimedEngine(ObservedEngine):
    """An engine that adds up the seconds of its calls.

    On a GPU every call is waited for. So a step takes a little longer than in a run that nobody measures,
    where the host prepares the next call meanwhile.

    Args:
        engine: Does the work.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine, before=self._start, after=self._stop)
        self.seconds = 0.0
        self.calls = 0
        self._begin = 0.0

    def _start(self, feeds: Mapping[str, Tensor]) -> None:
        wait_for(self.device)
        self._begin = time.perf_counter()

    def _stop(self, feeds: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        wait_for(self.device)
        self.seconds += time.perf_counter() - self._begin
        self.calls += 1


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
