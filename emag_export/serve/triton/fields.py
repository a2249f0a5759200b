"""What a request to Triton says: inputs by name, and the keyword of sampling that each sets."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from emag_export.errors import PARAMETER

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


FIELDS: Mapping[str, Field] = MappingProxyType(
    {
        "NEGATIVE_PROMPT": Field(keyword="negative_prompt", kind="STRING"),
        "SEED": Field(keyword="seed", kind="INT64"),
        "STEPS": Field(keyword="steps", kind="INT32"),
        "GUIDANCE": Field(keyword="guidance", kind="STRING"),
        "GUIDANCE_SCALE": Field(keyword="guidance_scale", kind="FP32"),
        "EMAG_SCALE": Field(keyword="emag_scale", kind="FP32"),
        "HEIGHT": Field(keyword="height", kind="INT32"),
        "WIDTH": Field(keyword="width", kind="INT32"),
    }
)


def in_inputs(message: str) -> str:
    """A message with inputs in place of the library's parameters."""
    inputs = {"prompt": PROMPT, **{field.keyword: name for name, field in FIELDS.items()}}
    return PARAMETER.sub(lambda match: inputs.get(match[1], match[1]), message)
