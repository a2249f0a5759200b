"""Peak memory: the two kinds on the host, told apart by what a child takes; the device, while it is open."""

import mmap
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from emag_export.bench import memory
from emag_export.bench.memory import HostMemory, MemorySampler, Peak, host_memory, measure_call, measure_peak
from emag_export.errors import EngineError, InputError

BIG, SMALL = 200_000_000, 60_000_000
# What else a child takes in the meantime, for example buffers of numpy's sum: 4 MB measured.
SLACK = 40_000_000
linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the kinds apart")


def fresh(size: int) -> np.ndarray:
    """Pages of its own that nobody had before: malloc may hand out some that are resident already."""
    pages = np.frombuffer(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
    pages.fill(1)
    return pages


def take(size: int, file: Path) -> int:
    """Some memory of its own, given back; then the pages of a file. Both held for many readings."""
    held = fresh(size)
    time.sleep(0.3)
    del held
    mapped = np.memmap(file, np.uint8, "r")
    total = int(mapped.sum())
    time.sleep(0.3)
    return size + total


@linux
def test_kinds_of_host_memory_are_those_that_the_child_takes(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes([1]) * SMALL)
    value, peak = measure_call(partial(take, BIG, file))
    assert value == BIG + SMALL
    assert peak.own is not None
    assert peak.mapped is not None
    assert BIG <= peak.own < BIG + SLACK
    assert SMALL <= peak.mapped < SMALL + SLACK
    # One after the other: the sum was never resident.
    assert BIG <= peak.resident < BIG + SLACK


@linux
def test_mapped_and_own_at_once_make_the_sum(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes([1]) * SMALL)
    with MemorySampler() as sampler:
        before = host_memory()
        mapped = np.memmap(file, np.uint8, "r")
        held = fresh(BIG)
        assert int(mapped.sum()) + held.size == BIG + SMALL
    peak = sampler.peak.above(before)
    assert BIG + SMALL <= peak.resident < BIG + SMALL + SLACK
    del held
    assert host_memory().resident < before.resident + SMALL + SLACK  # a reading is of now, not of the peak


def test_sampler_says_so_when_there_is_nothing_to_read() -> None:
    pid = os.posix_spawn(sys.executable, [sys.executable, "-c", ""], os.environ)
    os.waitpid(pid, 0)
    with MemorySampler(pid) as sampler:
        pass
    with pytest.raises(EngineError, match="ended before its memory could be read"):
        _ = sampler.peak
    with pytest.raises(EngineError, match="no process"):
        host_memory(pid)


def _refuse() -> None:
    raise InputError("seven is too many; give six")


def _die() -> None:
    os._exit(9)


def test_errors_of_the_child_arrive_and_its_death_is_an_error() -> None:
    with pytest.raises(InputError, match="seven is too many"):
        measure_call(_refuse)
    with pytest.raises(EngineError, match="ended from outside"):
        measure_call(_die)


@contextmanager
def _opened(size: int, device: str) -> Iterator[torch.device]:
    held = torch.ones(size, dtype=torch.uint8, device=device)
    yield held.device
    del held
    torch.cuda.empty_cache()


def test_on_the_host_there_is_no_device_memory() -> None:
    peak = measure_peak(partial(_opened, BIG, "cpu"))
    assert BIG <= peak.host.resident < BIG + SLACK
    assert peak.device is None


def test_device_memory_is_read_while_open_and_without_what_others_hold(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A GPU of 100 bytes, 30 of them another program's: there is none here to ask."""
    used = [30]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100 - used[0], 100))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)

    @contextmanager
    def run(device: str) -> Iterator[torch.device]:
        used[0] += 25
        yield torch.device(device)
        used[0] -= 25

    gpu = torch.device("cuda")
    assert memory._while_open(partial(run, "cuda:0"), gpu, 70) == 25
    assert memory._while_open(partial(run, "cpu"), gpu, 70) is None
    assert memory._while_open(partial(run, "cuda:1"), gpu, 70) is None
    assert used == [30]


@pytest.mark.gpu
def test_device_memory_is_what_was_held_on_the_gpu() -> None:
    peak = measure_peak(partial(_opened, BIG, "cuda"), torch.device("cuda"))
    assert peak.device is not None
    assert BIG <= peak.device < BIG + SLACK


def test_rise_is_counted_from_the_earlier_reading() -> None:
    before = HostMemory(resident=50, own=20, mapped=30)
    assert HostMemory(resident=70, own=45, mapped=25).above(before) == HostMemory(
        resident=20, own=25, mapped=0
    )
    unknown = HostMemory(resident=70, own=None, mapped=None)
    assert unknown.above(before) == HostMemory(resident=20, own=None, mapped=None)
    assert Peak(host=unknown, device=None).host.own is None
