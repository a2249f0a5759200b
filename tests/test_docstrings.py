"""Docstrings are read as they are meant by what makes the API reference of them: griffe, in Google style."""

import logging
from collections.abc import Iterator
from pathlib import Path

import griffe
import pytest

import emag_export

ROOT = Path(emag_export.__file__).parent.parent
LISTS = (griffe.DocstringSectionKind.returns, griffe.DocstringSectionKind.yields)


@pytest.fixture
def warned() -> Iterator[list[str]]:
    """What griffe complains of during a test."""
    found: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    # Once mkdocstrings is imported, griffe's messages go to mkdocs.
    logs = [logging.getLogger(name) for name in ("griffe", "mkdocs")]
    levels = [log.level for log in logs]
    for log in logs:
        log.addHandler(handler)
        log.setLevel(logging.WARNING)  # a command that ran before has silenced libraries
    yield found
    for log, level in zip(logs, levels, strict=True):
        log.removeHandler(handler)
        log.setLevel(level)


def documented(owner: griffe.Module | griffe.Class) -> Iterator[griffe.Object]:
    """Everything below it that has a docstring, itself left out."""
    for member in owner.members.values():
        if isinstance(member, griffe.Alias):
            continue
        if member.docstring is not None:
            yield member
        if isinstance(member, griffe.Module | griffe.Class):
            yield from documented(member)


def test_griffe_reads_every_docstring_without_a_warning(warned: list[str]) -> None:
    """Every entry of ``Args:`` is a parameter, and no second line of a result is taken for another result."""
    package = griffe.load("emag_export", search_paths=[ROOT], docstring_parser="google")
    assert isinstance(package, griffe.Module)
    found = list(documented(package))
    assert len(found) > 2000
    torn = []
    for item in found:
        assert item.docstring is not None
        for section in item.docstring.parse("google"):
            if section.kind in LISTS and (len(section.value) != 1 or section.value[0].name):
                torn.append(item.path)
    assert not torn, "indent the second line of Returns: or Yields:, and put no colon behind the first word"
    assert not warned


def test_a_wrong_docstring_is_noticed(warned: list[str]) -> None:
    """What the test above relies on: a line that is out of place is a warning, in one function as in many."""
    wrong = griffe.Docstring("Do.\n\nArgs:\n    one: First,\n    and no second line.\n", lineno=1)
    wrong.parse("google")
    assert any("name: description" in message for message in warned), warned
