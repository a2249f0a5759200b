"""Run a command in a process of its own, with a time limit; however it ends, that is an answer."""

import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import IO

from emag_export.bench.memory import HostMemory, MemorySampler
from emag_export.errors import EngineError

__all__ = ["Ended", "run_child"]

_SAID = 2000
"""Characters of its last words that are kept."""

_INTERVAL = 0.05
"""Seconds between readings of its memory: a child that measures time shall not notice."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a child ended."""

    code: int
    """Its exit code, or minus the signal that ended it."""
    late: bool
    """It was ended because its time was up."""
    said: str
    """The end of what it wrote to standard error."""


Reader = Callable[[str, HostMemory | None], None]
"""(line of standard output, peak of the child's resident host memory until then)"""


def run_child(command: Sequence[str], limit: float, read: Reader) -> Ended:
    """Run a command, and hand over what it writes line by line.

    The command gets a group of its own, which is ended with it: compilers start processes, too.

    Args:
        command: Program and arguments.
        limit: Seconds.
        read: Called with every line as soon as it is there. Memory is None where it could not be read.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=said, text=True, errors="replace", start_new_session=True
        )
        late = threading.Event()

        def stop() -> None:
            if child.poll() is None:
                late.set()
            _end_group(child)

        timer = threading.Timer(limit, stop)
        timer.start()
        try:
            _read_lines(child, read)
            child.wait()
        finally:
            timer.cancel()
            _end_group(child)
            child.wait()
        return Ended(code=child.returncode, late=late.is_set(), said=_tail(said))


def _read_lines(child: "subprocess.Popen[str]", read: Reader) -> None:
    assert child.stdout is not None, "opened with a pipe"
    with child.stdout as lines, MemorySampler(child.pid, _INTERVAL) as sampler:
        for line in lines:
            memory = None
            with suppress(EngineError):
                memory = sampler.peak
            read(line, memory)


def _end_group(child: "subprocess.Popen[str]") -> None:
    """The group outlives its leader for as long as anything in it runs."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)


def _tail(file: IO[str]) -> str:
    file.seek(0)
    return file.read()[-_SAID:].strip()
