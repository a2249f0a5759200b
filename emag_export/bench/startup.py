"""From a bundle on the disk to a denoiser that has run, beside reading its weights once."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch

from emag_export.bench.contender import forked
from emag_export.bench.session import Entry, Setup
from emag_export.bundle import DENOISER

__all__ = ["Startup", "measure_startup"]

_CHUNK = 1 << 24
_STEPS = 2
"""The first one, and one to compare it with."""


@dataclass(frozen=True, kw_only=True)
class Startup:
    """Seconds; medians of several starts, each after the system was asked to forget the files."""

    weights: int
    """Bytes in the denoiser's folder."""
    read: float
    """Reading all of them once, in order."""
    open: float
    """Opening the denoiser: hashes checked, weights loaded, graph made ready."""
    first_call: float
    """What the first call takes longer than the second."""

    @property
    def ratio(self) -> float:
        """Everything until the first call could begin, over reading the weights once."""
        return (self.open + self.first_call) / self.read


def measure_startup(setup: Setup, backend: str, repeats: int = 3) -> Startup:
    """Start the first bundle's denoiser on one backend, alternating with plain reading.

    Args:
        setup: Says what a step is.
        backend: One of the setup's.
        repeats: Starts of each kind.
    """
    bundle = setup.bundles[0]
    setup = replace(setup, request=replace(setup.request, steps=max(_STEPS, setup.request.steps)))
    files = [path for path in sorted((bundle.path / DENOISER).iterdir()) if path.is_file()]
    entry = Entry(bundle=bundle, guidance=setup.own, backend=backend)
    starts = list(_starts(setup, entry, files, repeats))
    read, opened, first = (median(values) for values in zip(*starts, strict=True))
    weights = sum(path.stat().st_size for path in files)
    return Startup(weights=weights, read=read, open=opened, first_call=max(0.0, first))


def _starts(
    setup: Setup, entry: Entry, files: list[Path], repeats: int
) -> Iterator[tuple[float, float, float]]:
    assert entry.backend is not None, "the diffusers model is not started from a bundle"
    for _ in range(repeats):
        _forget(files)
        begin = time.perf_counter()
        _read(files)
        read = time.perf_counter() - begin
        _forget(files)
        begin = time.perf_counter()
        engine = setup.backends[entry.backend](entry.bundle)(entry.bundle, DENOISER)
        opened = time.perf_counter() - begin
        with engine, torch.inference_mode():
            steps = forked(engine, setup.prepared(entry, engine.device)).steps()
            first, second = next(steps), next(steps)
            steps.close()
        yield read, opened, first.seconds - second.seconds


def _read(files: list[Path]) -> None:
    buffer = bytearray(_CHUNK)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def _forget(files: list[Path]) -> None:
    """Ask the system to drop the files from its cache; the host of a virtual disk may still keep them."""
    if hasattr(os, "posix_fadvise"):
        for path in files:
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
