"""What a run found: counts of every module, the survivors, and the tables for the documents."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.mutants.changes import KINDS
from tests.mutants.children import Outcome
from tests.mutants.judged import Judgement, Judgements, Verdict, judgement_of
from tests.mutants.mutate import Mutant
from tests.mutants.subjects import SAMPLE, SEED, SUBJECTS

__all__ = ["LEAST", "RESULTS", "Found", "axes", "counts", "module_table", "rows", "survivor_table"]

RESULTS = Path("benchmarks/results/mutants.json")
"""From the root of the repository."""
LEAST = 0.9
"""Part of the mutants that are not equivalent which the tests must notice."""


def axes() -> dict[str, Any]:
    """What is varied."""
    return {
        "module": [subject.path for subject in SUBJECTS],
        "kind": list(KINDS),
        "sample": SAMPLE,
        "seed": SEED,
    }


@dataclass(frozen=True, kw_only=True)
class Found:
    """A mutant that was run, and what was said of it."""

    mutant: Mutant
    outcome: Outcome
    judgement: Judgement | None

    @classmethod
    def of(cls, mutant: Mutant, outcome: Outcome, judgements: Judgements) -> "Found":
        """With the judgement that belongs to the mutant, if it survived."""
        judgement = judgement_of(mutant, judgements) if outcome.passed else None
        return cls(mutant=mutant, outcome=outcome, judgement=judgement)

    def is_(self, verdict: Verdict) -> bool:
        """Whether it survived and that was said of it."""
        return self.judgement is not None and self.judgement.verdict == verdict


def counts(found: Sequence[Found]) -> dict[str, Any]:
    """How many there are of each fate, and the score: killed of those that are not equivalent."""
    killed = sum(not one.outcome.passed for one in found)
    equivalent = sum(one.is_(Verdict.EQUIVALENT) for one in found)
    return {
        "mutants": len(found),
        "killed": killed,
        "timeouts": sum(one.outcome.by == "timeout" for one in found),
        "equivalent": equivalent,
        "accepted": sum(one.is_(Verdict.ACCEPTED) for one in found),
        "score": killed / (len(found) - equivalent) if len(found) > equivalent else 1.0,
    }


def rows(found: Sequence[Found]) -> dict[str, Any]:
    """All that goes into the results file."""
    modules = {one.mutant.path: None for one in found}
    return {
        "processor_seconds": round(sum(one.outcome.seconds for one in found)),
        "total": counts(found),
        "modules": [
            {"module": path, **counts([one for one in found if one.mutant.path == path])} for path in modules
        ],
        "survivors": [_survivor(one) for one in found if one.outcome.passed],
    }


def _survivor(found: Found) -> dict[str, str]:
    mutant, judgement = found.mutant, found.judgement
    return {
        "name": mutant.name,
        "module": mutant.path,
        "function": mutant.function,
        "before": mutant.before,
        "after": mutant.after,
        "verdict": "" if judgement is None else str(judgement.verdict),
        "why": "" if judgement is None else judgement.why,
    }


def module_table(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows; a header that begins with ``>`` is of numbers."""
    headers = ["module", ">mutants", ">noticed", ">equivalent", ">accepted", ">score"]
    table = [_counted(f"`{row['module']}`", row) for row in results["modules"]]
    return headers, [*table, _counted("**all**", results["total"])]


def _counted(name: str, row: Mapping[str, Any]) -> list[str]:
    numbers = [str(row[column]) for column in ("mutants", "killed", "equivalent", "accepted")]
    return [name, *numbers, f"{row['score']:.1%}"]


def survivor_table(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows."""
    headers = ["function", "in the module", "in the mutant", "judgement"]
    return headers, [
        [
            _code(f"{_stem(row['module'])}.{row['function']}".rstrip(".")),
            _code(row["before"]),
            _code(row["after"]),
            f"{row['verdict']}: {row['why']}",
        ]
        for row in results["survivors"]
    ]


def _stem(path: str) -> str:
    return Path(path).stem


def _code(text: str) -> str:
    """A cell of a table; a bar would end it."""
    return f"`{text}`".replace("|", "\\|")


def unjudged(found: Iterable[Found]) -> list[Mutant]:
    """Survivors of which nothing has been said."""
    return [one.mutant for one in found if one.outcome.passed and one.judgement is None]
