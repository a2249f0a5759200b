"""Forked children that run tests: how long they may take, and how they ended."""

import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest

__all__ = [
    "BROKEN",
    "Child",
    "InChild",
    "Limits",
    "Outcome",
    "Outcomes",
    "fork_child",
    "or_exit",
    "run_children",
    "send",
]

BROKEN = 70
"""Exit status of a child in which something else than the tests went wrong."""
_PAUSE = 0.01
"""Seconds between two looks at the children."""
_PATIENCE = 30.0
"""Times its processor time that a child may take by the clock: machines are busy."""

Trial = TypeVar("Trial")


class InChild(BaseException):
    """Raised behind a fork, in the child, to leave what was the parent's work."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How the tests ended."""

    passed: bool
    seconds: float
    """Of processor time."""
    by: str
    """The test or the file that failed first; otherwise what ended the run; empty if all passed."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a child may use: a mutant may go on for ever, and ask for as much memory as it likes."""

    seconds: int = 600
    """Of processor time."""
    memory: int = 8 << 30
    """Bytes beyond what it begins with."""

    def apply(self) -> None:
        """In the child."""
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
        memory = pages * resource.getpagesize() + self.memory
        for limit, most in ((resource.RLIMIT_CPU, self.seconds), (resource.RLIMIT_AS, memory)):
            resource.setrlimit(limit, (most, resource.getrlimit(limit)[1]))


Outcomes = Generator[tuple[str, Outcome], None, None]
"""Name and outcome of what has been run, in the order in which it ends."""


class Child:
    """A child that runs tests."""

    def __init__(self, pid: int, report: int, limits: Limits, log: Path) -> None:
        self._pid, self._report, self._log = pid, report, log
        self._late = time.monotonic() + _PATIENCE * limits.seconds
        self._ended, self._status, self._seconds = False, 0, 0.0

    def has_ended(self) -> bool:
        """Whether it has; if it sleeps for ever, it is ended here."""
        if not self._ended:
            if time.monotonic() > self._late:
                os.kill(self._pid, signal.SIGXCPU)
                self._late = float("inf")
            pid, self._status, usage = os.wait4(self._pid, os.WNOHANG)
            self._seconds = usage.ru_utime + usage.ru_stime
            self._ended = pid != 0
        return self._ended

    def wait(self) -> Outcome:
        """Until it has ended."""
        while not self.has_ended():
            time.sleep(_PAUSE)
        return self.outcome()

    def outcome(self) -> Outcome:
        """Of a child that has ended.

        Raises:
            RuntimeError: If something else than a test went wrong in it.
        """
        with os.fdopen(self._report, "rb") as pipe:
            found = pipe.read()
        if os.WIFSIGNALED(self._status):
            name = signal.Signals(os.WTERMSIG(self._status)).name
            return self._failed("timeout" if name == "SIGXCPU" else name)
        if os.WEXITSTATUS(self._status) == BROKEN or not found:
            raise RuntimeError(f"the tests could not be run; {self._log} says why")
        said = json.loads(found)
        code = pytest.ExitCode(said["code"])
        if code == pytest.ExitCode.OK:
            return Outcome(passed=True, seconds=self._seconds, by="")
        return self._failed(said["by"] or code.name.lower())

    def _failed(self, by: str) -> Outcome:
        return Outcome(passed=False, seconds=self._seconds, by=by)

    def kill(self, *, group: bool = False) -> None:
        """End it, if it runs, or everything in its group."""
        with suppress(ProcessLookupError):
            if group:
                os.killpg(self._pid, signal.SIGKILL)
            elif not self._ended:
                os.kill(self._pid, signal.SIGKILL)
        if not self._ended:
            os.waitpid(self._pid, 0)
            self._ended = True


@contextmanager
def or_exit() -> Iterator[None]:
    """What goes wrong in a child beside its tests ends it, and is no failure of a test."""
    try:
        yield
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(BROKEN)


def send(report: int, code: int, by: str) -> None:
    """What a child says at its end."""
    os.write(report, json.dumps({"code": code, "by": by}).encode())


def fork_child(limits: Limits, log: Path) -> tuple[Child | None, int]:
    """Fork: a child and nothing here; nothing and where to :func:`send` to in the child.

    Args:
        limits: Of the child.
        log: Gets what it prints.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid != 0:
        os.close(writing)
        return Child(pid, reading, limits, log), -1
    os.close(reading)
    with or_exit():
        printed = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(printed, 1)
        os.dup2(printed, 2)
        limits.apply()
    return None, writing


def run_children(
    trials: Iterable[tuple[str, Trial]], start: Callable[[Trial, int], Child], workers: int
) -> Outcomes:
    """Run trials, some at a time. Close the generator to end them all.

    Args:
        trials: Name and what is run.
        start: (what is run, number of the worker) to its child.
        workers: Children at a time.

    Yields:
        Name and outcome, in the order in which they end.
    """
    owner, waiting, running = os.getpid(), iter(trials), dict[int, tuple[str, Child]]()
    try:
        while True:
            for worker in set(range(workers)) - running.keys():
                if (found := next(waiting, None)) is not None:
                    running[worker] = found[0], start(found[1], worker)
            if not running:
                return
            ended = [worker for worker, (_, child) in running.items() if child.has_ended()]
            for name, child in map(running.pop, ended):
                yield name, child.outcome()
            time.sleep(_PAUSE)
    finally:
        if os.getpid() == owner:
            for _, child in running.values():
                child.kill()
