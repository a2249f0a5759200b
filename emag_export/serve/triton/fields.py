"""What a request to Triton says: inputs by name, and the keyword of sampling that each sets."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from emag_export.errors import PARAMETER
from emag_export.runtime.keywords import SAMPLING_KEYWORDS

__all__ = ["FIELDS", "PICTURE", "PROMPT", "Field", "in_inputs"]

PROMPT = "PROMPT"
PICTURE = "PNG"
"""The only output: a PNG that carries its parameters."""


@dataclass(frozen=True, kw_only=True)
class Field:
    """An optional input."""

    keyword: str
    """Of :class:`~emag_export.runtime.keywords.SamplingKeywords`."""
    kind: str
    """As Triton calls it, without ``TYPE_``."""
    count: int = 1
    """How many values it takes; -1 is any number."""


def _field(keyword: str) -> Field:
    kind = next(kind for kind, names in _KINDS.items() if keyword in names)
    return Field(keyword=keyword, kind=kind, count=_COUNTS.get(keyword, 1))


_KINDS: Mapping[str, tuple[str, ...]] = {
    "STRING": ("negative_prompt", "guidance", "emag_unit"),
    "INT64": ("seed",),
    "INT32": (
        *("steps", "height", "width", "emag_start", "emag_delta", "emag_stop", "emag_blocks"),
        *("random_blocks", "cfg_zero_init", "guided_channels"),
    ),
    "FP32": (
        *("guidance_scale", "embedded_guidance", "guidance_interval", "cfg_rescale"),
        *("emag_scale", "emag_beta", "emag_strength", "blur_sigma"),
    ),
    "BOOL": ("cfg_zero_star", "tcfg"),
}
"""Triton's type to the keywords that have it."""

_COUNTS: Mapping[str, int] = {"guidance_interval": 2, "emag_blocks": -1}

FIELDS: Mapping[str, Field] = MappingProxyType(
    {keyword.upper(): _field(keyword) for keyword in SAMPLING_KEYWORDS}
)
"""Input to what it sets: everything that can be asked for."""


def in_inputs(message: str) -> str:
    """A message with inputs in place of the library's parameters."""
    inputs = {"prompt": PROMPT, **{field.keyword: name for name, field in FIELDS.items()}}
    return PARAMETER.sub(lambda match: inputs.get(match[1], match[1]), message)
