"""Options about sampling, and how they become a request."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from emag_export.bundle import Bundle
from emag_export.cli.options import Blocks
from emag_export.errors import InputError
from emag_export.runtime.guidance.rules import GUIDANCES
from emag_export.runtime.request import GenerationRequest, default_request

__all__ = ["amend", "read_prompts", "request_of", "sampling_options"]

Command = Callable[..., Any]


def sampling_options(command: Command) -> Command:
    """Everything about sampling; what is not given comes from the bundle's defaults."""
    options = [
        click.option("--guidance", type=click.Choice(list(GUIDANCES)), help="Default: emag."),
        click.option("--guidance-scale", type=float, help="w of CFG or APG."),
        click.option("--emag-scale", type=float, help="s of EMAG; 1 is no EMAG."),
        click.option("--steps", type=int, help="Denoising steps."),
        click.option("--height", type=int, help="Pixels."),
        click.option("--width", type=int, help="Pixels."),
        click.option("--beta", type=float, help="Decay of the moving average, 0.988."),
        click.option("--start", type=int, help="Averaging begins, in 250ths before the end: 250."),
        click.option("--delta", type=int, help="Perturbation begins this much later: 50."),
        click.option("--stop", type=int, help="Both end: 50."),
        click.option("--strength", type=float, help="lambda, how much of the average is used: 1."),
        click.option(
            "--blocks", type=Blocks(), help="Perturb these blocks in every step instead of choosing one."
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def request_of(bundle: Bundle, prompt: str, options: Mapping[str, Any]) -> GenerationRequest:
    """The bundle's defaults, changed by whatever options were given.

    Args:
        bundle: Gives defaults.
        prompt: What to draw.
        options: Of :func:`sampling_options`, and ``seed``, ``negative_prompt`` where a command has them.

    Raises:
        InputError: If a value is out of range.
    """
    return amend(default_request(bundle, prompt), options)


def amend(request: GenerationRequest, options: Mapping[str, Any]) -> GenerationRequest:
    """A request changed by the options that were given; None is not given."""

    def given(**names: str) -> dict[str, Any]:
        return {field: options[name] for field, name in names.items() if options.get(name) is not None}

    guidance = replace(
        request.guidance, **given(name="guidance", scale="guidance_scale", emag_scale="emag_scale")
    )
    guidance = replace(guidance, apg=replace(guidance.apg, **given(scale="guidance_scale")))
    windows = replace(
        request.windows, **given(beta="beta", start="start", delta="delta", stop="stop", strength="strength")
    )
    return replace(
        request,
        guidance=guidance,
        windows=windows,
        **given(
            steps="steps",
            height="height",
            width="width",
            seed="seed",
            negative_prompt="negative_prompt",
            fixed_blocks="blocks",
        ),
    )


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
        raise InputError('there is nothing to draw; give --prompt "..." or --prompt-file FILE')
    return lines
