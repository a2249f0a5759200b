"""What people said of survivors: ``judged.toml``, keyed by what changes, so that lines may move."""

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from tests.mutants.mutate import Mutant

__all__ = ["FILE", "Judgement", "Verdict", "judgement_of", "read_judgements"]

FILE = Path(__file__).with_name("judged.toml")


class Verdict(StrEnum):
    """What a survivor says of the tests."""

    EQUIVALENT = "equivalent"
    """Nothing: no test can tell it from the module, as both do the same."""
    ACCEPTED = "accepted"
    """It does something else, and that is not worth a test."""


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """Of one survivor, or of several that are the same change at two places of a line."""

    module: str
    function: str
    before: str
    after: str
    verdict: Verdict
    why: str

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What it is found by."""
        return self.module, self.function, self.before, self.after


Judgements = Mapping[tuple[str, str, str, str], Judgement]


def read_judgements(path: Path = FILE) -> Judgements:
    """All of them, by their keys.

    Raises:
        ValueError: If one is there twice, or has no reason.
    """
    found: dict[tuple[str, str, str, str], Judgement] = {}
    for entry in tomllib.loads(path.read_text("utf-8")).get("judged", []):
        one = Judgement(**{**entry, "verdict": Verdict(entry["verdict"])})
        if one.key in found:
            raise ValueError(f"{path.name} judges twice: {one.before} -> {one.after} in {one.function}")
        if not one.why:
            raise ValueError(f"{path.name} gives no reason: {one.before} -> {one.after} in {one.function}")
        found[one.key] = one
    return found


def judgement_of(mutant: Mutant, judgements: Judgements) -> Judgement | None:
    """What was said of a mutant, None if nothing was."""
    return judgements.get((mutant.path, mutant.function, mutant.before, mutant.after))


def stale(judgements: Judgements, mutants: Iterable[Mutant]) -> list[Judgement]:
    """Judgements of mutants that there are no longer."""
    existing = {(one.path, one.function, one.before, one.after) for one in mutants}
    return [judgement for key, judgement in judgements.items() if key not in existing]
