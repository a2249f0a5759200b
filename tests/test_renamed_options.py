"""Old spellings of options still work, with a hint."""

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from emag_export.cli.console import status
from emag_export.cli.main import main
from tests.command_line import commands, options_of

WINDOWS = {
    "--beta": ("--emag-beta", "0.5"),
    "--start": ("--emag-start", "200"),
    "--delta": ("--emag-delta", "20"),
    "--stop": ("--emag-stop", "10"),
    "--strength": ("--emag-strength", "0.25"),
    "--blocks": ("--emag-blocks", "3-4"),
}
SIDES = {"--height": ("--height-range", "64"), "--width": ("--width-range", "32:64:96")}
OLD: dict[str, tuple[list[str], dict[str, tuple[str, str]]]] = {
    "build": (
        ["--model", "tiny-sd3"],
        {"--emag-layers": ("--emag-candidates", "3,4"), "--seed": ("--weights-seed", "1"), **SIDES},
    ),
    "compile": (["b", "--backend", "tensorrt-rtx"], SIDES),
    "generate": (["b", "-o", "a.png"], WINDOWS),
    "compare": (["b"], {**WINDOWS, "--reference": ("--source", "somewhere")}),
    "bench": (
        ["b"],
        {**WINDOWS, "--reference": ("--source", "somewhere"), "--images": ("--batch-size", "2")},
    ),
    "plan": (["b"], WINDOWS),
}
"""Command to what it needs, and to its old spellings with the new ones and a value."""


def test_every_old_spelling_is_in_the_table_and_free() -> None:
    """An option that has an old spelling today would be read as the new one."""
    for name, command in commands().items():
        renamed = getattr(command, "_renamed", {})
        assert renamed == {old: new for old, (new, _) in OLD.get(name, ([], {}))[1].items()}, name
        assert not renamed.keys() & options_of(command)
        assert options_of(command) >= set(renamed.values())


@pytest.mark.parametrize("name", OLD)
def test_old_spellings_work_with_a_hint(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the value as a word of its own, and behind an equals sign."""
    needed, spellings = OLD[name]
    seen: list[dict[str, Any]] = []

    def see(**params: Any) -> None:
        seen.append(params)

    monkeypatch.setattr(commands()[name], "callback", see)
    monkeypatch.setattr(status, "width", 200)
    today = [word for new, value in spellings.values() for word in (new, value)]
    before = [word for old, (_, value) in spellings.items() for word in (old, value)]
    joined = [f"{old}={value}" for old, (_, value) in spellings.items()]
    hints = [
        f"{old} is now {new}; the old name goes with the next version" for old, (new, _) in spellings.items()
    ]
    for words, said in ((today, []), (before, hints), (joined, hints)):
        done = CliRunner().invoke(main, [name, *needed, *words])
        assert done.exit_code == 0, done.output
        assert done.stderr.splitlines() == said
        assert done.stdout == ""
    assert seen[0] == seen[1] == seen[2]
    assert seen[0] != _defaults(name, needed), "the values arrived"


def _defaults(name: str, needed: list[str]) -> dict[str, Any]:
    return commands()[name].make_context(name, list(needed)).params


def test_a_hint_is_a_warning_so_quiet_silences_it(tiny_bundle: Path) -> None:
    words = ["plan", str(tiny_bundle), "--beta", "0.5"]
    said = CliRunner().invoke(main, words)
    assert "--beta is now --emag-beta" in said.stderr
    quiet = CliRunner().invoke(main, ["--quiet", *words])
    CliRunner().invoke(main, ["models"])  # the console is one for the process: as it was before
    assert (quiet.stderr, quiet.stdout) == ("", said.stdout)
    assert said.stdout == CliRunner().invoke(main, ["plan", str(tiny_bundle), "--emag-beta", "0.5"]).stdout
