"""From the body of a request to requests for pictures, within the operator's limits."""

import re
import secrets
from dataclasses import replace
from typing import Any

from emag_export.runtime.keywords import request_for
from emag_export.runtime.request import GenerationRequest
from emag_export.serve.errors import OF_GUIDANCE, ApiError
from emag_export.serve.models import ServedModel
from emag_export.serve.schemas import GenerationBody
from emag_export.serve.settings import ServerSettings

__all__ = ["preview_steps", "requests_of"]

_SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})")
_EMAG = ("scale", "beta", "start", "delta", "stop", "strength", "unit")
_SEEDS = 2**32
"""Of those that are drawn: short enough to be typed."""
_LARGER = 4
"""A picture may have that many times the pixels of the bundle's own, where the operator says nothing."""


def requests_of(
    body: GenerationBody, model: ServedModel, settings: ServerSettings
) -> list[GenerationRequest]:
    """One request per picture, seeds counting up.

    Args:
        body: As it came.
        model: That will draw.
        settings: With the limits.

    Raises:
        ApiError: If something is beyond the limits.
        InputError: If a value cannot be used.
    """
    _check_limits(body, model, settings)
    options = body.emag
    given: dict[str, Any] = {
        "guidance": options.guidance,
        "guidance_scale": body.guidance_scale,
        "steps": body.num_inference_steps,
        "seed": secrets.randbelow(_SEEDS) if body.seed is None else body.seed,
        "negative_prompt": body.negative_prompt,
        **_sides(body.size, model, settings),
        **{f"emag_{name}": getattr(options, name) for name in _EMAG},
        **{name: getattr(options, name) for name in OF_GUIDANCE},
        "guidance_interval": None if options.guidance_interval is None else tuple(options.guidance_interval),
        "emag_blocks": None if options.blocks is None else tuple(options.blocks),
    }
    base = request_for(model.bundle, body.prompt, given)  # type: ignore[arg-type]
    if base.steps > settings.max_steps:
        raise _beyond("num_inference_steps", base.steps, f"at most {settings.max_steps}")
    return [replace(base, seed=base.seed + index) for index in range(body.n)]


def preview_steps(body: GenerationBody, steps: int) -> frozenset[int]:
    """Steps after which a preview is streamed; never the last one, whose picture is finished.

    Args:
        body: As it came.
        steps: Of the run.
    """
    if not body.stream:
        return frozenset()
    if body.emag.preview_every is not None:
        every = body.emag.preview_every
        return frozenset(range(every - 1, steps - 1, every))
    parts = body.partial_images + 1
    shown = {round(part * steps / parts) - 1 for part in range(1, parts)}
    return frozenset(index for index in shown if 0 <= index < steps - 1)


def _check_limits(body: GenerationBody, model: ServedModel, settings: ServerSettings) -> None:
    if body.n > (most := model.most_images(settings)):
        raise _beyond("n", body.n, f"at most {most}")
    for name in ("prompt", "negative_prompt"):
        text = getattr(body, name) or ""
        if len(text) > settings.max_prompt:
            raise _beyond(name, f"{len(text)} characters long", f"at most {settings.max_prompt}")
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise _beyond(name, "cut within a character", "whole characters: a lone surrogate is none")
    if body.seed is not None and body.seed + body.n > 2**63:
        raise _beyond("seed", body.seed, "at most 2^63 - n, as seeds count up")
    _check_previews(body, model)


def _check_previews(body: GenerationBody, model: ServedModel) -> None:
    if not body.partial_images and body.emag.preview_every is None:
        return
    name = "partial_images" if body.partial_images else "emag.preview_every"
    if not body.stream:
        said = f"'{name}' needs 'stream': true; add it, or leave '{name}' out"
        raise ApiError(400, said, param=name, code="invalid_value")
    if model.bundle.preview is None:
        said = (
            f"{model.name} has no previews: its bundle was built without a VAE or with random weights; "
            f"leave '{name}' out"
        )
        raise ApiError(400, said, param=name, code="no_previews")


def _sides(size: str, model: ServedModel, settings: ServerSettings) -> dict[str, int]:
    if size == "auto":
        return {}
    match = _SIZE.fullmatch(size)
    if match is None:
        raise _beyond("size", repr(size[:20]), "WIDTHxHEIGHT in pixels, like 1024x1024, or auto")
    width, height = int(match[1]), int(match[2])
    defaults = model.bundle.defaults
    most = settings.max_pixels or _LARGER * defaults.height * defaults.width
    if width * height > most:
        raise _beyond("size", f"{size}, {width * height} pixels", f"at most {most} pixels")
    return {"height": height, "width": width}


def _beyond(param: str, got: object, wanted: str) -> ApiError:
    return ApiError(400, f"'{param}' is {got}; give {wanted}", param=param, code="invalid_value")
