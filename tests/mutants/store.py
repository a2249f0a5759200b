"""Outcomes on the disk: a run that was interrupted continues, and what is unchanged is not run again."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from tests.mutants.children import Outcome

__all__ = ["Store", "key_of"]


def key_of(surroundings: str, path: str, source: str) -> str:
    """Of an outcome: whatever decides it is in there.

    Args:
        surroundings: Hash of the tests and of all other modules.
        path: Of the module.
        source: That it has.
    """
    return hashlib.sha256(f"{surroundings}\n{path}\n{source}".encode()).hexdigest()


class Store:
    """A file with a line for every outcome, written when it is known.

    Args:
        path: The file; made with its folder when the first outcome is added.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, Outcome] = {}
        if path.is_file():
            for line in path.read_text("utf-8").splitlines():
                try:
                    found = json.loads(line)
                    key = found.pop("key")
                    self._known[key] = Outcome(**found)
                except (ValueError, TypeError, KeyError):
                    continue  # half a line: whoever wrote it was killed

    def get(self, key: str) -> Outcome | None:
        """The outcome, None if it is not known."""
        return self._known.get(key)

    def add(self, key: str, outcome: Outcome) -> None:
        """Keep an outcome, at once on the disk too."""
        self._known[key] = outcome
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, **asdict(outcome)}) + "\n")
