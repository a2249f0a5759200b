"""Every ``--help`` is what its file says; ``python -m tests.help`` writes them anew."""

import re

import click
import pytest

from emag_export.cli.main import main
from tests.help import FOLDER, commands, shown


@pytest.mark.parametrize("name", commands())
def test_help_is_as_stored(name: str) -> None:
    assert shown(name) == (FOLDER / f"{name}.txt").read_text("utf-8")


def test_every_file_belongs_to_a_command() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.txt")) == sorted(commands())


@pytest.mark.parametrize("name", commands())
def test_help_fits_a_terminal_and_shows_no_markup(name: str) -> None:
    for line in shown(name).splitlines():
        assert len(line) <= 80, line
        assert line == line.rstrip(), repr(line)
        assert line.isprintable(), repr(line)
        assert not re.search(r"\\[a-z]|``|:\w+:`", line), line


def test_the_first_commands_stand_on_lines_of_their_own() -> None:
    """They were one paragraph once, with a literal backslash in front."""
    assert "\n    emag-export build --model tiny-sd3 -o bundle\n" in shown("emag-export")


@pytest.mark.parametrize("name", [name for name in commands() if name != "emag-export"])
def test_every_option_is_explained_and_stands_in_a_group(name: str) -> None:
    command = main.get_command(click.Context(main), name)
    assert command is not None
    for option in command.params:
        assert isinstance(option, click.Argument) or (isinstance(option, click.Option) and option.help), (
            option
        )
    *_, others = shown(name).split("\n\n")
    assert others == "Other options:\n  -h, --help  Show this message and exit.\n"
