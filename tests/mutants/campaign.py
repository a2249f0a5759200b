"""Outcomes of all mutants; those that are not known are run."""

import gc
import importlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from itertools import groupby
from pathlib import Path

from tests.mutants.children import Outcome
from tests.mutants.mutate import Mutant
from tests.mutants.run import Suite, limits_after, run_anew, run_collected
from tests.mutants.store import Store, key_of
from tests.mutants.subjects import OPTIONS, Subject, surroundings

__all__ = ["Notify", "outcomes_of"]

Notify = Callable[[str, Outcome, int], None]
"""(name of a mutant, its outcome, how many are to be run in all), whenever one has ended."""

_IMPORTS = 60.0
"""Seconds of processor time for the imports of a child that has to make them all, several times over."""


def outcomes_of(
    subjects: Sequence[Subject],
    mutants: Sequence[Mutant],
    folder: Path,
    *,
    jobs: int,
    preloaded: Iterable[str],
    notify: Notify,
) -> dict[str, Outcome]:
    """The outcome of every mutant, by name.

    Args:
        subjects: Modules and their tests, relative to the working directory.
        mutants: Of these modules.
        folder: Where outcomes are kept, and what children print.
        jobs: Children at a time.
        preloaded: Modules that all tests need; imported if anything has to be run.
        notify: Told of every outcome that was not known.

    Raises:
        RuntimeError: If tests fail on a module that is not mutated.
    """
    store = Store(folder / "outcomes.jsonl")
    around = {subject.path: surroundings(Path(), subject) for subject in subjects}
    keys = {mutant.name: key_of(around[mutant.path], mutant.path, mutant.source) for mutant in mutants}
    missing = [mutant for mutant in mutants if store.get(keys[mutant.name]) is None]
    if missing:
        _preload(preloaded)
    for _, group in groupby(subjects, lambda subject: subject.tests):
        alike = {subject.path: subject for subject in group}
        own = [mutant for mutant in missing if mutant.path in alike]
        if own:
            tests = next(iter(alike.values())).files
            suite = Suite(paths=tuple(alike), tests=tests, options=OPTIONS, log=folder, workers=jobs)
            for name, outcome in _run(suite, own):
                store.add(keys[name], outcome)
                notify(name, outcome, len(missing))
    return {name: _known(store, key) for name, key in keys.items()}


def _run(suite: Suite, mutants: Sequence[Mutant]) -> Iterator[tuple[str, Outcome]]:
    whole = None
    with closing(run_collected(suite, [mutant for mutant in mutants if mutant.inside])) as ended:
        for name, outcome in ended:
            if whole is not None:
                yield name, outcome
            elif outcome.passed:
                whole = outcome
            else:
                raise RuntimeError(f"{outcome.by} fails, though nothing is mutated")
    assert whole is not None, "the tests of the module itself are always run"
    outside = [mutant for mutant in mutants if not mutant.inside]
    with closing(run_anew(suite, outside, limits_after(whole, _IMPORTS))) as ended:
        yield from ended


def _known(store: Store, key: str) -> Outcome:
    outcome = store.get(key)
    assert outcome is not None, "what was missing has been run"
    return outcome


def _preload(names: Iterable[str]) -> None:
    """Before the first fork. One thread, as forks and threads do not go together."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    for name in names:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
