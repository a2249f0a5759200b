"""A figure with a unit comes from a results file or is counted, or ``typed.toml`` says why it was typed."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.render import DOCUMENTS

FILE = Path(__file__).with_name("typed.toml")
TYPED: dict[str, dict[str, str]] = tomllib.loads(FILE.read_text("utf-8"))
"""Document to figures as they are written, to why."""

# What is rendered, run, a name, or an address; in this order, as code may hold any of the others.
_OTHERS = re.compile(
    r"^ *```.*?^ *```|<!-- table: .*?<!-- end of table -->|<!-- number: [\w-]+ -->[^<\n]*<!-- / -->"
    r"|`[^`\n]*`|\]\([^)]*\)",
    re.MULTILINE | re.DOTALL,
)
_NUMBER = r"\d(?:[\d.,–]*\d)?"
_UNIT = r"(?:dB|µs|ms|s|seconds?|minutes?|hours?|[kMG]i?B|points?|times|billion)(?![\w-])"
_FIGURE = re.compile(rf"(?<![\w.,–-]){_NUMBER}(?: (?:to|and|or) {_NUMBER})?(?:\s?[%×]|\s{_UNIT})")


def figures(text: str) -> Iterator[str]:
    for match in _FIGURE.finditer(_OTHERS.sub("…", text)):
        yield " ".join(match[0].split())


@pytest.mark.parametrize("path", DOCUMENTS, ids=str)
def test_typed_figures_have_a_reason(path: Path) -> None:
    found = set(figures(path.read_text("utf-8")))
    listed = TYPED.get(path.as_posix(), {})
    unlisted = sorted(found - set(listed))
    assert not unlisted, f"render them (benchmarks/numbers.py), or say in {FILE.name} why not"
    assert not sorted(set(listed) - found), f"no longer there; take them out of {FILE.name}"


def test_every_document_listed_is_one() -> None:
    assert set(TYPED) <= {path.as_posix() for path in DOCUMENTS}
    assert all(why.strip() for reasons in TYPED.values() for why in reasons.values())


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("takes 1.24 times as long, or 12 ms", ["1.24 times", "12 ms"]),
        ("2.2 to 3.7 s and 5 %", ["2.2 to 3.7 s", "5 %"]),
        ("<!-- number: fork -->1.24<!-- / --> times, `5 MB`, w 7, s 1.5", []),
        ("```sh\nsleep 5 s\n```\n[3 points](a-4-MB.md)", ["3 points"]),
        ("over\n40\nMB", ["40 MB"]),
    ],
)
def test_figures_are_found(text: str, wanted: list[str]) -> None:
    assert list(figures(text)) == wanted
