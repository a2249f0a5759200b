"""Options about sampling, and how they become a request."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
from cloup import option

from emag_export.bundle import Bundle
from emag_export.cli.options import Blocks, group
from emag_export.errors import InputError
from emag_export.runtime.guidance.rules import GUIDANCES, Guidance
from emag_export.runtime.keywords import SAMPLING_KEYWORDS, SamplingKeywords, request_for
from emag_export.runtime.request import GenerationRequest
from emag_export.runtime.sampling.plan import EmagWindows

__all__ = ["RENAMED", "keywords_of", "read_prompts", "request_of", "sampling_options"]

Decorated = Callable[..., Any]

RENAMED = {
    "--beta": "--emag-beta",
    "--start": "--emag-start",
    "--delta": "--emag-delta",
    "--stop": "--emag-stop",
    "--strength": "--emag-strength",
    "--blocks": "--emag-blocks",
}
"""Old spelling to new one."""

_DEFAULTS = EmagWindows()


def sampling_options(function: Decorated) -> Decorated:
    """Everything about sampling; what is not given comes from the bundle's defaults."""
    function = group(
        "EMAG",
        option(
            "--emag-scale",
            type=float,
            help="How far to steer away from the hard negative (s); 1 is no EMAG. Default: the bundle's.",
        ),
        option(
            "--emag-start",
            type=int,
            help=f"Where averaging begins, in 250ths of a run before its end. Default {_DEFAULTS.start}.",
        ),
        option(
            "--emag-delta",
            type=int,
            help=f"How many 250ths later perturbation begins. Default {_DEFAULTS.delta}.",
        ),
        option(
            "--emag-stop", type=int, help=f"Where both end, in 250ths from the end. Default {_DEFAULTS.stop}."
        ),
        option(
            "--emag-beta", type=float, help=f"Decay of the moving average per step. Default {_DEFAULTS.beta}."
        ),
        option(
            "--emag-strength",
            type=float,
            help=f"How much of the average is used, 0 to 1 (lambda). Default {_DEFAULTS.strength:g}.",
        ),
        option(
            "--emag-blocks",
            type=Blocks(),
            help="Perturb these candidates in every step instead of choosing one.",
        ),
    )(function)
    return group(
        "Sampling",
        option(
            "--guidance",
            type=click.Choice(list(GUIDANCES)),
            help=f"Rule that combines the predictions. Default: {Guidance.name}.",
        ),
        option(
            "--guidance-scale",
            type=float,
            help="How far to steer towards the prompt (w). Default: the bundle's.",
        ),
        option("--steps", type=int, help="Denoising steps. Default: the bundle's."),
        option("--height", type=int, help="Pixels. Default: the bundle's."),
        option("--width", type=int, help="Pixels. Default: the bundle's."),
    )(function)


def keywords_of(options: Mapping[str, Any]) -> SamplingKeywords:
    """The sampling keywords among a command's options."""
    given: Any = {name: options[name] for name in SAMPLING_KEYWORDS if name in options}
    words: SamplingKeywords = given
    return words


def request_of(bundle: Bundle, prompt: str, options: Mapping[str, Any]) -> GenerationRequest:
    """The bundle's defaults, changed by whatever options were given.

    Args:
        bundle: Gives defaults.
        prompt: What to draw.
        options: Of :func:`sampling_options`, and ``seed``, ``negative_prompt`` where a command has them.

    Raises:
        InputError: If a value is out of range.
    """
    return request_for(bundle, prompt, keywords_of(options))


def read_prompts(prompts: tuple[str, ...], prompt_file: Path | None) -> list[str]:
    """Prompts from the command line and a file with one prompt per line.

    Raises:
        InputError: If there is none, or the file cannot be read.
    """
    lines = list(prompts)
    if prompt_file is not None:
        try:
            text = prompt_file.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{prompt_file} cannot be read as UTF-8 text: {error}") from error
        found = [line.strip() for line in text.splitlines() if line.strip()]
        if not found:
            raise InputError(f"{prompt_file} holds no prompt; write one per line")
        lines += found
    if not lines:
        raise InputError("there is nothing to draw; give `prompt` or `prompt_file`")
    return lines
