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
from emag_export.runtime.sampling.plan import EmagWindows, Unit

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

_DEFAULTS, _GUIDANCE = EmagWindows(), Guidance()


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
            help="Where averaging begins, in 250ths of a run before its end. Default: the bundle's.",
        ),
        option(
            "--emag-delta",
            type=int,
            help="How many 250ths later perturbation begins. Default: the bundle's.",
        ),
        option(
            "--emag-stop", type=int, help="Where both end, in 250ths from the end. Default: the bundle's."
        ),
        option(
            "--emag-unit",
            type=click.Choice([str(unit) for unit in Unit]),
            help="Of the three above: 250ths of a run, or steps. Default: the bundle's.",
        ),
        option(
            "--emag-beta", type=float, help=f"Decay of the moving average per step. Default {_DEFAULTS.beta}."
        ),
        option(
            "--emag-strength",
            type=float,
            help=f"How much is perturbed, 0 to 1 (lambda). Default {_DEFAULTS.strength:g}.",
        ),
        option(
            "--emag-blocks",
            type=Blocks(),
            help="Perturb these candidates in every step.",
        ),
        option(
            "--random-blocks",
            type=int,
            help="Perturb so many candidates, drawn anew in every step (S², with the negative skip).",
        ),
        option(
            "--blur-sigma",
            type=float,
            help="How far the negative blur-query blurs, in image tokens. Default inf, the mean of all.",
        ),
    )(function)
    function = group(
        "Guidance",
        option(
            "--guidance-interval",
            type=float,
            nargs=2,
            metavar="LOW HIGH",
            help="Steer towards the prompt in this part of a run only, from 0, the first step, to 1, the "
            f"last. Default {_GUIDANCE.interval[0]:g} {_GUIDANCE.interval[1]:g}.",
        ),
        option(
            "--cfg-rescale",
            type=float,
            help="Keep the spread of the prediction given the prompt, 0 to 1 (phi of rescaled CFG). "
            f"Default {_GUIDANCE.rescale:g}.",
        ),
        option(
            "--cfg-zero-star/--no-cfg-zero-star",
            default=None,
            help="CFG-Zero*: scale the prediction without the prompt to fit the one with it, and begin with "
            "a prediction of 0.",
        ),
        option(
            "--cfg-zero-init",
            type=int,
            help=f"For so many steps, with --cfg-zero-star. Default {_GUIDANCE.zero_init}.",
        ),
        option(
            "--tcfg/--no-tcfg",
            default=None,
            help="TCFG: drop of the prediction without the prompt what it does not share with the one with "
            "it.",
        ),
        option(
            "--guided-channels",
            type=int,
            help="Guide the first so many channels of the prediction only. Default: all.",
        ),
    )(function)
    return group(
        "Sampling",
        option(
            "--guidance",
            type=click.Choice(list(GUIDANCES)),
            help="Rule that combines the predictions. Default: the bundle's.",
        ),
        option(
            "--guidance-scale",
            type=float,
            help="How far to steer towards the prompt (w). Default: the bundle's.",
        ),
        option(
            "--embedded-guidance",
            type=float,
            help="Scale that the model takes as an input, where guidance was distilled into it. Default: the "
            "bundle's.",
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
