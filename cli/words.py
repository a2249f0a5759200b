"""The command line's own words: parameters as options, calls as commands, errors as sentences."""

import shlex
from collections.abc import Mapping
from typing import Any

from emag_export.contract import PRECISIONS
from emag_export.errors import PARAMETER, Call, EmagError
from emag_export.families import SWITCHES

__all__ = ["command_of", "in_words", "option_of", "sentence"]

_OPTIONS: Mapping[str, str] = {
    "output": "-o",
    "targets": "--target",
    "loras": "--lora",
    "queue_images": "--max-queue",
    "without": " or ".join(f"--no-{switch}" for switch in SWITCHES),
}
"""Parameters whose option has another name."""

_POSITIONAL = ("bundle",)


def option_of(parameter: str) -> str:
    """The option that sets a parameter."""
    return _OPTIONS.get(parameter, f"--{parameter.replace('_', '-')}")


def in_words(message: str) -> str:
    """A message with options in place of parameters."""
    return PARAMETER.sub(lambda match: option_of(match[1]), message)


def sentence(error: EmagError) -> str:
    """An error as the command line says it: parameters are options, its remedy is a command."""
    message = in_words(error.message)
    return message if error.remedy is None else f"{message}: {command_of(error.remedy)}"


def command_of(call: Call) -> str:
    """What to type for a call."""
    words = ["emag-export", call.verb]
    words += [str(call.arguments[name]) for name in _POSITIONAL if name in call.arguments]
    for name, value in call.arguments.items():
        if name not in _POSITIONAL:
            words += _words(name, value)
    return shlex.join(words)


def _words(name: str, value: Any) -> list[str]:
    option = option_of(name)
    if isinstance(value, bool):
        return [option] if value else [f"--no-{name.replace('_', '-')}"]
    if name == "weights_seed":
        return ["--weights", "random", option, str(value)]
    if name == "without":
        switches = {component: switch for switch, component in SWITCHES.items()}
        return [f"--no-{switches[component]}" for component in value]
    if name in ("targets", "loras"):
        return [word for item in value for word in (option, str(item))]
    if name in ("precision", "state_precision"):
        value = next((short for short, dtype in PRECISIONS.items() if dtype == value), value)
    if isinstance(value, tuple):
        value = ",".join(map(str, value))
    return [option, str(value)]
