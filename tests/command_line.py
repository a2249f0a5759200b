"""The commands as click holds them, for tests of their options."""

import shlex
from typing import Any

import click

from emag_export.cli.main import main


def commands() -> dict[str, click.Command]:
    context = click.Context(main)
    found = {name: main.get_command(context, name) for name in main.list_commands(context)}
    return {name: command for name, command in found.items() if command is not None}


def options_of(command: click.Command) -> set[str]:
    """Every spelling, ``--no-…`` included."""
    return {spelling for option in command.params for spelling in (*option.opts, *option.secondary_opts)}


def parsed(command: str) -> dict[str, Any]:
    """What the command line makes of a command."""
    program, verb, *words = shlex.split(command)
    assert program == "emag-export"
    return commands()[verb].make_context(verb, words).params
