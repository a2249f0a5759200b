"""Peak memory of work that is done in a new process: within one process peaks cannot be told apart.

Resident host memory is of two kinds, which mean different things to whoever plans a machine: memory of the
process itself, and pages of files that it has mapped, which the system can drop and read again. Device memory
is a third thing, and is never added to them.
"""

import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import psutil  # type: ignore[import-untyped]
import torch

from emag_export.errors import EngineError

__all__ = ["HostMemory", "MemorySampler", "Peak", "host_memory", "measure_call", "measure_peak"]

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class HostMemory:
    """Resident memory of a process, bytes.

    As a peak, each field is its own highest value. The kinds need not be highest at the same time, so their
    sum can be more than ``resident``.
    """

    resident: int
    """Both kinds together."""
    own: int | None
    """Memory of its own: anonymous pages (RssAnon). None where the system does not tell the kinds apart."""
    mapped: int | None
    """Pages of mapped files, for example weights, and shared memory: RssFile and RssShmem. None as above."""

    def above(self, before: "HostMemory") -> "HostMemory":
        """What came on top of an earlier reading of the same process; at least 0."""

        def rise(now: int | None, then: int | None) -> int | None:
            return None if now is None or then is None else max(0, now - then)

        return HostMemory(
            resident=max(0, self.resident - before.resident),
            own=rise(self.own, before.own),
            mapped=rise(self.mapped, before.mapped),
        )


@dataclass(frozen=True, kw_only=True)
class Peak:
    """On top of an interpreter with everything imported and, where a GPU is measured, PyTorch's context."""

    host: HostMemory
    """Resident host memory at its highest."""
    device: int | None
    """Bytes in use on the GPU while what was run is still open; None where nothing ran on that GPU."""


def host_memory(pid: int | None = None) -> HostMemory:
    """What is resident now.

    Args:
        pid: Of the process; None is this one.

    Raises:
        EngineError: If there is no such process any more.
    """
    found = _read(os.getpid() if pid is None else pid)
    if found is None:
        raise EngineError(f"there is no process {pid} to measure; it has ended, look at what it wrote")
    return found[0]


class MemorySampler:
    """Highest resident memory of a process while the ``with`` is open.

    On Linux both kinds are read from ``/proc/PID/status`` again and again, so a peak shorter than the
    interval can be missed. Their sum is the kernel's own record (``VmHWM``), which misses nothing; where that
    record cannot be reset it is sampled too. On other systems there is the sum only, sampled.

    A process that holds the interpreter's lock for long stops its own sampler: better watch from outside, as
    :func:`measure_call` does. Processes that the watched one starts are not counted.

    Args:
        pid: Of the process; None is this one.
        interval: Seconds between two readings, each of which takes some 50 microseconds.
    """

    def __init__(self, pid: int | None = None, interval: float = 0.005) -> None:
        self._pid = os.getpid() if pid is None else pid
        self._interval = interval
        self._exact = False
        self._readings: list[HostMemory] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="memory sampler", daemon=True)

    @property
    def peak(self) -> HostMemory:
        """Highest so far.

        Raises:
            EngineError: If the process had ended before it could be read once.
        """
        if not self._readings:
            raise EngineError(f"process {self._pid} ended before its memory could be read; run it again")
        return self._readings[0]

    def _sample(self) -> None:
        while not self._stop.wait(self._interval):
            self._take()

    def _take(self) -> None:
        found = _read(self._pid)
        if found is None:
            return
        now, highest = found
        if self._exact:
            now = HostMemory(resident=highest, own=now.own, mapped=now.mapped)
        self._readings = [_highest(now, *self._readings)]

    def __enter__(self) -> Self:
        self._exact = _reset_highest(self._pid)
        self._take()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._take()


def measure_call(run: Callable[[], Value]) -> tuple[Value, HostMemory]:
    """Run a function in a new process: what it returned, and the peak of its resident host memory.

    Args:
        run: Can be pickled, and so can what it returns. Imports that come with it are not measured, those
            that it makes itself are.

    Returns:
        Its value, and peaks on top of an interpreter with everything imported.

    Raises:
        EngineError: If the process was ended from outside; whatever ``run`` raises.
    """
    return _measure(partial(_call, run), None)


def measure_peak(
    run: Callable[[], AbstractContextManager[torch.device]], gpu: torch.device | None = None
) -> Peak:
    """Peak memory of something that is run in a new process.

    Device memory is read while it is open, less what was in use in that process before. The allocators of
    PyTorch, onnxruntime and TensorRT keep what they took until they are closed, so that reading is the peak.
    What other programs take or give back on that GPU in between counts too: nothing else should use it.

    Args:
        run: Can be pickled. Does everything before it yields the device it ran on, and closes after that.
        gpu: Whose memory is read; None reads none.

    Raises:
        EngineError: If the process was ended from outside; whatever ``run`` raises.
    """
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # what this process keeps, the new one cannot have
    device, host = _measure(partial(_while_open, run, gpu), gpu)
    return Peak(host=host, device=device)


def _measure(task: Callable[[int | None], Value], gpu: torch.device | None) -> tuple[Value, HostMemory]:
    """Run a task in a new process that is watched from this one.

    Args:
        task: Told the bytes that were free on ``gpu`` before.
        gpu: None for none.
    """
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
            pid, before, free = pool.submit(_arrive, task, gpu).result()
            with MemorySampler(pid) as sampler:
                value = pool.submit(task, free).result()
            return value, sampler.peak.above(before)
    except BrokenProcessPool as error:
        raise EngineError(
            "the process whose memory was measured was ended from outside, most often because memory ran "
            "out; measure something smaller, or end other programs"
        ) from error


def _arrive(task: object, gpu: torch.device | None) -> tuple[int, HostMemory, int | None]:
    """Process number, its memory, free device memory: all before the task, whose imports came with it."""
    free = None
    if gpu is not None:
        torch.zeros(1, device=gpu)  # PyTorch's context, which is no part of what is measured
        torch.cuda.synchronize(gpu)
        free = torch.cuda.mem_get_info(gpu)[0]
    return os.getpid(), host_memory(), free


def _call(run: Callable[[], Value], free: int | None) -> Value:
    return run()


def _while_open(
    run: Callable[[], AbstractContextManager[torch.device]], gpu: torch.device | None, free: int | None
) -> int | None:
    """Bytes that are in use on ``gpu`` now and were free before."""
    with run() as device:
        if gpu is None or free is None or (device.type, device.index or 0) != (gpu.type, gpu.index or 0):
            return None
        torch.cuda.synchronize(gpu)
        return free - torch.cuda.mem_get_info(gpu)[0]


def _highest(*readings: HostMemory) -> HostMemory:
    own = [reading.own for reading in readings if reading.own is not None]
    mapped = [reading.mapped for reading in readings if reading.mapped is not None]
    return HostMemory(
        resident=max(reading.resident for reading in readings),
        own=max(own, default=None),
        mapped=max(mapped, default=None),
    )


def _read(pid: int) -> tuple[HostMemory, int] | None:
    """What is resident now, and the highest that the system knows of; None once the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text("utf-8", errors="replace").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return _read_sum(pid)
    parts = (line.split() for line in lines if line.startswith(("Vm", "Rss")))
    sizes = {part[0].rstrip(":"): 1024 * int(part[1]) for part in parts}
    if "VmRSS" not in sizes:
        return None  # ended, but its parent has not asked how
    mapped = sizes["RssFile"] + sizes["RssShmem"]
    now = HostMemory(resident=sizes["VmRSS"], own=sizes["RssAnon"], mapped=mapped)
    return now, sizes["VmHWM"]


def _read_sum(pid: int) -> tuple[HostMemory, int] | None:
    """Where there is no /proc, and for a process that is no longer there."""
    try:
        resident: int = psutil.Process(pid).memory_info().rss
    except psutil.Error:
        return None
    return HostMemory(resident=resident, own=None, mapped=None), resident


def _reset_highest(pid: int) -> bool:
    """Make the kernel's record of the highest resident memory start anew; whether it did."""
    try:
        Path(f"/proc/{pid}/clear_refs").write_text("5", "ascii")
    except OSError:
        return False
    return True
