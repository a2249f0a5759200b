"""Moments on the clock of whatever does the work."""

import time
from typing import Any

import torch

__all__ = ["mark", "seconds_between"]


def mark(device: torch.device) -> Any:
    """This moment. On a GPU an event in the caller's current stream, for which the host does not wait.

    An engine with a stream of its own stays in order with that one, so the event comes after its work.
    """
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def seconds_between(first: Any, second: Any) -> float:
    """From one mark to another; only once the device has been waited for."""
    return float(second - first if isinstance(first, float) else first.elapsed_time(second) / 1e3)
