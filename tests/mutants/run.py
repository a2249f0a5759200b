"""Runs of pytest on mutants, in two ways.

A change outside of functions is there when the module is imported, so that a child imports everything anew,
which takes seconds. A change within a function is made when tests have been collected: pytest forks before
its first test, and the child, which has everything imported, gets the function's new code.
"""

import json
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

import pytest

from tests.mutants.children import (
    Child,
    InChild,
    Limits,
    Outcome,
    Outcomes,
    fork_child,
    or_exit,
    run_children,
    send,
)
from tests.mutants.exchange import Function, Loaded, exchange_source
from tests.mutants.mutate import Mutant

__all__ = ["Suite", "limits_after", "run_anew", "run_collected"]


EXAMPLES = 10
"""Of a property, a tenth of what hypothesis draws else: a mutant that is noticed is noticed early."""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Tests of some modules."""

    paths: tuple[str, ...]
    """Files of the modules."""
    tests: Mapping[str, str]
    """Files, in the order in which they are run, to patterns of the names of their tests that are run."""
    options: tuple[str, ...] = ()
    """Of pytest."""
    log: Path
    """Folder for what children print."""
    workers: int = 2
    """Children at a time."""

    def start_log(self, name: str) -> Path:
        """Where a child prints to."""
        self.log.mkdir(parents=True, exist_ok=True)
        return self.log / f"{name}.txt"


def run_anew(suite: Suite, mutants: Iterable[Mutant], limits: Limits) -> Outcomes:
    """Run a suite on each mutant, in a child that imports it. Close the generator to end all.

    What children need should have been imported here, but for the module and all that imports it.

    Args:
        suite: What is run.
        mutants: On what.
        limits: Of a child.

    Yields:
        Name and outcome, in the order in which they end.

    Raises:
        RuntimeError: If something else than a test went wrong in a child.
    """

    def start(mutant: Mutant, worker: int) -> Child:
        child, report = fork_child(limits, suite.start_log(f"anew-{worker}"))
        return child or _pytest(suite, report, _Watcher(suite.tests), mutant)

    return run_children(((mutant.name, mutant) for mutant in mutants), start, suite.workers)


def run_collected(suite: Suite, mutants: Sequence[Mutant]) -> Outcomes:
    """Run a suite on each mutant, all of whose changes are within functions; close the generator to end all.

    Before that it runs once on the modules as they are, whose outcome comes first, under no name; what that
    takes limits the others.

    Args:
        suite: What is run.
        mutants: On what.

    Yields:
        Name and outcome, in the order in which they end.

    Raises:
        RuntimeError: If something else than a test went wrong in a child.
    """
    reading, writing = os.pipe()
    child, report = fork_child(Limits(seconds=1 << 20), suite.start_log("collected"))
    if child is None:
        os.close(reading)
        os.setpgid(0, 0)  # with its own children, so that all can be ended together
        _pytest(suite, report, _Server(suite, mutants, writing))
    os.close(writing)
    try:
        with os.fdopen(reading, encoding="utf-8") as lines:
            for line in lines:
                found = json.loads(line)
                yield found.pop("name"), Outcome(**found)
        whole = child.wait()
        if not whole.passed:
            raise RuntimeError(f"tests cannot be collected: {whole.by}")
    finally:
        child.kill(group=True)


def limits_after(whole: Outcome, fixed: float = 10.0) -> Limits:
    """What a mutant may take where the tests of the module itself took so much.

    Args:
        whole: Of the module itself.
        fixed: Seconds beside.
    """
    return Limits(seconds=round(fixed + 5 * whole.seconds))


def _pytest(suite: Suite, report: int, watcher: "_Watcher", mutant: Mutant | None = None) -> NoReturn:
    """Never returns: what stands behind the fork is the parent's."""
    with or_exit():
        if mutant is not None:
            exchange_source(mutant.path, mutant.source)
        code = pytest.main([*suite.options, *suite.tests], plugins=[watcher])
        send(watcher.report or report, int(code), watcher.failed)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


class _Watcher:
    """A plugin of pytest: remembers what failed first, and makes runs short and repeatable."""

    report = 0
    """Where to say so; 0 leaves it to whoever started pytest."""

    def __init__(self, tests: Mapping[str, str]) -> None:
        self.failed = ""
        self._parts = {Path(name).resolve(): part for name, part in tests.items()}

    def pytest_configure(self) -> None:
        """Behind conftest.py, which loads a profile of its own, and before any test file is imported."""
        if "hypothesis" in sys.modules:
            import hypothesis
            from hypothesis import Phase

            # A failure is enough: shrinking it would take longer than finding it.
            hypothesis.settings.register_profile(
                "mutants",
                deadline=None,
                database=None,
                derandomize=True,
                max_examples=EXAMPLES,
                phases=(Phase.explicit, Phase.generate),
            )
            hypothesis.settings.load_profile("mutants")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Those that are wanted, in the order of the files."""
        order = list(self._parts)
        items[:] = sorted(
            (item for item in items if re.search(self._parts[item.path], item.name)),
            key=lambda item: order.index(item.path),
        )

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be imported."""
        self._note(report)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test."""
        self._note(report)

    def _note(self, report: pytest.CollectReport | pytest.TestReport) -> None:
        if report.failed and not self.failed:
            self.failed = report.nodeid


class _Server(_Watcher):
    """Likewise; where the first test would be run, it forks a child for every mutant, which runs some.

    A first child runs all on the modules as they are, and writes down which functions each test calls and how
    long it takes; a mutant then meets the tests that call its function, the fastest first.
    """

    def __init__(self, suite: Suite, mutants: Sequence[Mutant], told: int) -> None:
        super().__init__(suite.tests)
        self._suite, self._mutants, self._told = suite, mutants, told
        self._uses: list[tuple[float, str, list[Function]]] | None = None
        self._loaded = Loaded(())

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        """True where everything is done; None where pytest shall go on, in a child or after errors."""
        if session.testsfailed:
            return None
        try:
            self._serve(session)
        except InChild:
            return None
        return True

    def _serve(self, session: pytest.Session) -> None:
        self._loaded = Loaded(self._suite.paths)
        ended = list(run_children([("", None)], partial(self._start_whole, Limits()), 1))
        for name, outcome in ended:
            self._tell(name, outcome)
        if outcome.passed:
            tests = self._tests_of(session.items)
            start = partial(self._start_mutant, limits_after(outcome), session, tests)
            trials = ((mutant.name, mutant) for mutant in self._mutants)
            for name, outcome in run_children(trials, start, self._suite.workers):
                self._tell(name, outcome)

    def _start_whole(self, limits: Limits, _: None, worker: int) -> Child:
        child, report = fork_child(limits, self._suite.start_log(f"collected-{worker}"))
        if child is None:
            self.report, self._uses = report, []
            raise InChild
        return child

    def _start_mutant(
        self,
        limits: Limits,
        session: pytest.Session,
        tests: Mapping[Function, list[pytest.Item]],
        mutant: Mutant,
        worker: int,
    ) -> Child:
        child, report = fork_child(limits, self._suite.start_log(f"collected-{worker}"))
        if child is None:
            self.report = report
            with or_exit():
                session.items[:] = tests.get(self._loaded.function_of(mutant), [])
                self._loaded.exchange(mutant)
            raise InChild
        return child

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """In the first child, write down what a test calls."""
        if self._uses is None:
            return (yield)
        began = time.process_time()
        with self._loaded.watched() as called:
            result = yield
        self._uses.append((time.process_time() - began, item.nodeid, sorted(called)))
        return result

    def pytest_sessionfinish(self) -> None:
        """In the first child, hand that on."""
        if self._uses is not None:
            self._file.write_text(json.dumps(self._uses), "utf-8")

    def _tests_of(self, items: Sequence[pytest.Item]) -> dict[Function, list[pytest.Item]]:
        named = {item.nodeid: item for item in items}
        found: dict[Function, list[pytest.Item]] = {}
        for _, name, functions in sorted(json.loads(self._file.read_text("utf-8"))):
            for path, function in functions:
                found.setdefault((path, function), []).append(named[name])
        return found

    @property
    def _file(self) -> Path:
        return self._suite.log / "uses.json"

    def _tell(self, name: str, outcome: Outcome) -> None:
        os.write(self._told, (json.dumps({"name": name, **asdict(outcome)}) + "\n").encode())
