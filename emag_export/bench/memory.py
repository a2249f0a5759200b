"""Peak memory, measured in a process of its own: within one process peaks cannot be told apart."""

import multiprocessing
import resource
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch

__all__ = ["Peak", "measure_peak"]


@dataclass(frozen=True, kw_only=True)
class Peak:
    """Bytes on top of an interpreter with everything imported."""

    host: int
    """Resident memory at its highest; weights that are mapped from the disk count."""
    device: int | None
    """What is in use on the GPU at the end, by every program there; None without one."""


def measure_peak(run: Callable[[], torch.device]) -> Peak:
    """Peak memory of a function that is run in a new process.

    Args:
        run: Can be pickled; returns the device it ran on.

    Raises:
        EmagError: Whatever ``run`` raises.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(_peak, run).result()


def _peak(run: Callable[[], torch.device]) -> Peak:
    before = psutil.Process().memory_info().rss
    device = run()
    held = None
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        free, total = torch.cuda.mem_get_info(device)
        held = total - free
    return Peak(host=_highest_resident() - before, device=held)


def _highest_resident() -> int:
    """Bytes. On Linux ``ru_maxrss`` is handed down from the process that started this one; VmHWM is not."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text("ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
