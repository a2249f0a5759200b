"""Every ``--help`` at 80 columns, as a file each: what a user reads first, so it is read in every change."""

from pathlib import Path

from click.testing import CliRunner

from emag_export.cli.main import main

FOLDER = Path(__file__).parent


def commands() -> list[str]:
    """The program itself and its commands."""
    import click

    context = click.Context(main)
    return ["emag-export", *main.list_commands(context)]


def shown(name: str) -> str:
    """What ``emag-export NAME --help`` prints on a terminal of 80 columns."""
    words = ["--help"] if name == "emag-export" else [name, "--help"]
    result = CliRunner().invoke(main, words, prog_name="emag-export", terminal_width=80)
    assert result.exit_code == 0, result.output
    return result.output
