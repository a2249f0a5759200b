"""Sampling keywords that come from outside: as text, or as plain data that may be of the wrong kind."""

from collections.abc import Mapping
from typing import Any

from emag_export.errors import InputError

__all__ = ["LISTS", "keyword_fits", "keyword_from"]

_INTEGERS = (
    *("steps", "height", "width", "seed", "emag_start", "emag_delta", "emag_stop"),
    *("cfg_zero_init", "guided_channels", "random_blocks"),
)
_NUMBERS = (
    *("guidance_scale", "embedded_guidance", "cfg_rescale"),
    *("emag_scale", "emag_beta", "emag_strength", "blur_sigma"),
)
_SWITCHES = ("cfg_zero_star", "tcfg")
LISTS: Mapping[str, type] = {"emag_blocks": int, "guidance_interval": float}
_TEXTS = ("guidance", "negative_prompt", "emag_unit")


def keyword_from(name: str, text: str) -> Any:
    """The value that a text means; a list is separated by spaces or commas.

    Args:
        name: Of a keyword; the value of any other name is the text itself.
        text: Not empty.

    Raises:
        InputError: If it is none.
    """
    try:
        if name in _INTEGERS:
            return int(text)
        if name in _NUMBERS:
            return float(text)
        if name in LISTS:
            return [LISTS[name](item) for item in text.replace(",", " ").split()]
    except ValueError as error:
        raise InputError(f"`{name}` is {text!r}; write a number") from error
    if name in _SWITCHES:
        if text.lower() not in ("true", "false"):
            raise InputError(f"`{name}` is {text!r}; write true or false")
        return text.lower() == "true"
    return text


def keyword_fits(name: str, value: Any) -> bool:
    """Whether a value is of the kind that a keyword takes; its range is for the request to check."""
    if isinstance(value, bool) or name in _SWITCHES:
        return isinstance(value, bool) and name in _SWITCHES
    if name in _INTEGERS:
        return isinstance(value, int)
    if name in _NUMBERS:
        return isinstance(value, int | float)
    if name in _TEXTS:
        return isinstance(value, str)
    if not isinstance(value, list):
        return False
    if name == "guidance_interval":
        return len(value) == 2 and all(type(end) in (int, float) for end in value)
    return all(type(block) is int for block in value)
