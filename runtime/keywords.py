"""The words in which a caller asks for pictures, and the request that they make."""

from dataclasses import replace
from typing import Any, TypedDict

from emag_export.bundle import Bundle
from emag_export.errors import InputError
from emag_export.kinds import member
from emag_export.runtime.request import GenerationRequest, default_request
from emag_export.runtime.sampling.plan import Unit

__all__ = ["SAMPLING_KEYWORDS", "SamplingKeywords", "amended", "request_for"]


class SamplingKeywords(TypedDict, total=False):
    """What is left out comes from the bundle's defaults; None is left out, too."""

    guidance: str | None
    """A name in :data:`~emag_export.runtime.guidance.rules.GUIDANCES`."""
    guidance_scale: float | None
    """w of CFG, or of APG."""
    embedded_guidance: float | None
    """Scale that a model takes as an input, where guidance was distilled into it."""
    guidance_interval: tuple[float, float] | None
    """Where w counts, low and high: fractions of the run, 0 the first step and 1 the last. Elsewhere there is
    no unconditional prediction."""
    cfg_rescale: float | None
    """phi of rescaled CFG, 0 to 1."""
    cfg_zero_star: bool | None
    """CFG-Zero*: scale the unconditional prediction to fit, and begin with a prediction of 0."""
    cfg_zero_init: int | None
    """For so many steps, with CFG-Zero*."""
    tcfg: bool | None
    """Tangential damping: drop what the unconditional prediction does not share with the conditional one."""
    guided_channels: int | None
    """Guide the first so many channels only."""
    emag_scale: float | None
    """s of EMAG; 1 is no EMAG."""
    steps: int | None
    height: int | None
    """Pixels."""
    width: int | None
    seed: int | None
    """Of the first picture; the next ones count up."""
    negative_prompt: str | None
    emag_beta: float | None
    """Decay of the moving average."""
    emag_start: int | None
    """Averaging begins, in ``emag_unit`` before the end of the run."""
    emag_delta: int | None
    """Perturbation begins this much later."""
    emag_stop: int | None
    """Both end."""
    emag_unit: str | None
    """Of start, delta and stop: ``250ths`` of the run, or ``steps``."""
    emag_strength: float | None
    """lambda, how much is perturbed."""
    emag_blocks: tuple[int, ...] | None
    """Perturb these candidates in every step."""
    random_blocks: int | None
    """Perturb so many candidates, drawn anew in every step."""
    blur_sigma: float | None
    """Of the negative ``blur-query``, in image tokens; infinity takes their mean."""


SAMPLING_KEYWORDS = tuple(SamplingKeywords.__annotations__)

_GUIDANCE = {
    "name": "guidance",
    "scale": "guidance_scale",
    "emag_scale": "emag_scale",
    "interval": "guidance_interval",
    "rescale": "cfg_rescale",
    "zero_star": "cfg_zero_star",
    "zero_init": "cfg_zero_init",
    "tangential": "tcfg",
    "guided_channels": "guided_channels",
}
"""Field of :class:`~emag_export.runtime.guidance.rules.Guidance` to the keyword that sets it."""

_WINDOWS = {
    **{name: f"emag_{name}" for name in ("beta", "start", "delta", "stop", "strength", "unit")},
    "blur_sigma": "blur_sigma",
}
"""Field of :class:`~emag_export.runtime.sampling.plan.EmagWindows` to the keyword that sets it."""


def request_for(bundle: Bundle, prompt: str, keywords: SamplingKeywords) -> GenerationRequest:
    """The bundle's defaults for a prompt, changed by the keywords that were given.

    Whether the prompt may be empty is for the guidance to say, so it comes last.

    Args:
        bundle: Gives defaults.
        prompt: What to draw.
        keywords: Of :class:`SamplingKeywords`.

    Raises:
        InputError: As :func:`amended`; or if there is no prompt and the guidance needs one.
    """
    return replace(amended(default_request(bundle, "-"), keywords), prompt=prompt)


def amended(request: GenerationRequest, keywords: SamplingKeywords) -> GenerationRequest:
    """A request changed by the keywords that were given.

    Args:
        request: Where to start from.
        keywords: Of :class:`SamplingKeywords`.

    Raises:
        InputError: If there is no such keyword, or a value is out of range.
    """
    if unknown := [name for name in keywords if name not in SAMPLING_KEYWORDS]:
        raise InputError(f"there is no keyword {unknown[0]!r}; there are {', '.join(SAMPLING_KEYWORDS)}")
    words: dict[str, Any] = {name: value for name, value in keywords.items() if value is not None}

    if "emag_unit" in words:
        words["emag_unit"] = member(Unit, words["emag_unit"], "`emag_unit`")

    def taken(**names: str) -> dict[str, Any]:
        return {field: words[name] for field, name in names.items() if name in words}

    guidance = replace(request.guidance, **taken(**_GUIDANCE))
    guidance = replace(guidance, apg=replace(guidance.apg, **taken(scale="guidance_scale")))
    windows = request.windows
    if words.get("steps", request.steps) != request.steps:  # they were in steps of another run
        windows = replace(windows, unit=Unit.RUN)
    windows = replace(windows, **taken(**_WINDOWS))
    fields = ("steps", "height", "width", "seed", "negative_prompt", "random_blocks", "embedded_guidance")
    return replace(
        request,
        guidance=guidance,
        windows=windows,
        **taken(**{name: name for name in fields}, fixed_blocks="emag_blocks"),
    )
