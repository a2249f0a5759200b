"""Keeping the host at most one call ahead of its device, and timing calls without stopping it."""

import time

import torch

__all__ = ["Pace"]


class Pace:
    """Waits, after every call, for the call before it.

    On a GPU a call returns when it is queued. A loop that ran on would queue whole runs, and whoever arrives
    or is cancelled would wait for all of them; with one call in flight the device still never idles. On a CPU
    calls are done when they return, and nothing is waited for.

    Args:
        device: Of the engine.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before: torch.cuda.Event | None = None
        self._last: float | None = None

    def after_call(self, started: float) -> float:
        """Seconds that a call took, as far as is known by now.

        Args:
            started: ``time.perf_counter()`` before the call.

        Returns:
            On a GPU, the time from one call's end to the next one's while the loop is busy.
        """
        if self._device.type != "cuda":
            return time.perf_counter() - started
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        if self._before is not None:
            self._before.synchronize()
        self._before = event
        now = time.perf_counter()
        since = started if self._last is None else self._last
        self._last = now
        return now - since

    def idle(self) -> None:
        """Tell that nothing follows for now: the next call is timed from its own start."""
        self._before, self._last = None, None
