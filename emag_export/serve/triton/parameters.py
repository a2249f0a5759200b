"""What ``config.pbtxt`` tells the model: how to open the bundle, and how much a request may ask for."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from emag_export.bundle import Bundle
from emag_export.engines.config import EngineConfig
from emag_export.errors import InputError
from emag_export.runtime.request import GenerationRequest

__all__ = ["Limits", "as_parameters", "engine_of", "limits_of"]

_LARGER = 4
"""Times the bundle's own picture, as in ``emag-export serve``."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Without them one request could take all memory, and harm every other one."""

    max_steps: int = 100
    max_pixels: int
    """Of one picture."""
    max_prompt: int = 4000
    """Characters, of the negative prompt too."""

    @classmethod
    def of(cls, bundle: Bundle) -> "Limits":
        """Limits that suit a bundle."""
        defaults = bundle.defaults
        return cls(
            max_steps=max(cls.max_steps, defaults.steps),
            max_pixels=_LARGER * defaults.height * defaults.width,
        )

    def check(self, request: GenerationRequest) -> None:
        """Refuse what is beyond them.

        Raises:
            InputError: With the input that is too large.
        """
        for name, text in (("prompt", request.prompt), ("negative_prompt", request.negative_prompt)):
            if len(text) > self.max_prompt:
                raise InputError(f"`{name}` has {len(text)} characters; give at most {self.max_prompt}")
        if request.steps > self.max_steps:
            raise InputError(f"`steps` is {request.steps}; give at most {self.max_steps}")
        if request.height * request.width > self.max_pixels:
            raise InputError(
                f"`width` {request.width} and `height` {request.height} make "
                f"{request.height * request.width} pixels; give at most {self.max_pixels}"
            )


def as_parameters(engine: EngineConfig, limits: Limits) -> dict[str, str]:
    """Both as text, by name; what is None is left out."""
    given = {
        field.name: getattr(record, field.name) for record in (engine, limits) for field in fields(record)
    }
    if engine.source is not None and Path(engine.source).exists():
        given["source"] = str(Path(engine.source).resolve())  # the server starts in a folder of its own
    return {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in given.items()
        if value is not None
    }


def engine_of(parameters: Mapping[str, str]) -> EngineConfig:
    """How to open the bundle; the inverse of :func:`as_parameters`.

    Raises:
        InputError: If a value cannot be used.
    """
    return EngineConfig(**_of(EngineConfig, parameters))


def limits_of(parameters: Mapping[str, str]) -> Limits:
    """What a request may ask for; the inverse of :func:`as_parameters`.

    Raises:
        InputError: If a value cannot be used.
    """
    return Limits(**_of(Limits, parameters))


def _of(record: type, parameters: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for field in fields(record):
        text = parameters.get(field.name)
        if text is None:
            continue
        if field.type in (str, str | None):
            found[field.name] = text
            continue
        try:
            found[field.name] = json.loads(text)
        except json.JSONDecodeError:
            raise InputError(
                f"the parameter {field.name} of config.pbtxt is {text!r}; give a number, true or false"
            ) from None
    return found
