"""Kinds of hard negatives: what each does to a candidate block, and what it keeps between two steps.

A table of facts. The arithmetic stands in ``exporter/graph/``, and a second time, written independently, in
``reference/kinds.py``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import TypeVar

from emag_export.errors import InputError

__all__ = ["KINDS", "Averaged", "KindFacts", "Renorm", "Variant", "member"]


class Variant(StrEnum):
    """What is done to the perturbed row in a candidate block.

    Examples:
        >>> from emag_export import Variant
        >>> Variant("emag-q").name, f"{Variant.EMAG_Q}"
        ('EMAG_Q', 'emag-q')
        >>> from emag_export.kinds import KINDS
        >>> [str(variant) for variant, kind in KINDS.items() if kind.averages is None]
        ['identity', 'blur-query', 'skip']
    """

    EMAG_Q = "emag-q"
    """Image-token queries, after QK normalisation, become their moving average."""
    EMAG = "emag"
    """Softmax rows of the image queries over all keys become theirs."""
    EMAG_I = "emag-i"
    """The image-to-image block of those rows."""
    EMAG_T = "emag-t"
    """The image-to-text block of those rows."""
    IDENTITY = "identity"
    """Every image token attends to itself alone: perturbed-attention guidance, PAG."""
    BLUR_QUERY = "blur-query"
    """Image queries are blurred over their grid: smoothed energy guidance, SEG."""
    SKIP = "skip"
    """The block is left out: skip-layer guidance (SLG), STG; with blocks drawn at random, S²."""


class Averaged(StrEnum):
    """What part of an attention a moving average follows."""

    QUERIES = "queries"
    ROWS = "softmax rows"
    IMAGE_BLOCK = "image block of the rows"
    TEXT_BLOCK = "text block of the rows"


@dataclass(frozen=True, kw_only=True)
class KindFacts:
    """What a kind of hard negative keeps between two steps, and what it takes besides."""

    averages: Averaged | None = None
    """None: it keeps nothing, so no step is needed to prepare another one."""
    blurs: bool = False
    """Takes a blur matrix per side of the grid."""
    whole_block: bool = False
    """Acts on what the block changes, not on its attention."""
    summary: str
    source: str
    """Paper and section."""


_EMAG = "arXiv:2512.17303, section 4"

KINDS: Mapping[Variant, KindFacts] = MappingProxyType(
    {
        Variant.EMAG_Q: KindFacts(
            averages=Averaged.QUERIES, summary="image queries become their moving average", source=_EMAG
        ),
        Variant.EMAG: KindFacts(
            averages=Averaged.ROWS, summary="attention maps become their moving average", source=_EMAG
        ),
        Variant.EMAG_I: KindFacts(
            averages=Averaged.IMAGE_BLOCK,
            summary="the part of the maps that falls on image tokens becomes its moving average",
            source=_EMAG,
        ),
        Variant.EMAG_T: KindFacts(
            averages=Averaged.TEXT_BLOCK,
            summary="the part of the maps that falls on text tokens becomes its moving average",
            source=_EMAG,
        ),
        Variant.IDENTITY: KindFacts(
            summary="every image token attends to itself alone (PAG)",
            source="arXiv:2403.17377, section 4.2",
        ),
        Variant.BLUR_QUERY: KindFacts(
            blurs=True,
            summary="image queries are blurred over the picture (SEG)",
            source="arXiv:2408.00760, section 4.2",
        ),
        Variant.SKIP: KindFacts(
            whole_block=True,
            summary="the block is left out (SLG, STG; S² with random blocks)",
            source="arXiv:2411.18664, section 3; arXiv:2508.12880",
        ),
    }
)
"""Every kind of hard negative."""


class Renorm(StrEnum):
    """How a partly replaced softmax row (``emag-i``, ``emag-t``) is brought back to sum one.

    Examples:
        >>> from emag_export import Renorm
        >>> [str(renorm) for renorm in Renorm]
        ['row', 'img2txt_only', 'none']
    """

    ROW = "row"
    """Divide the whole row by its sum."""
    IMG2TXT_ONLY = "img2txt_only"
    """Keep the image-to-image block, scale the image-to-text block to fill the rest."""
    NONE = "none"


Member = TypeVar("Member", bound=StrEnum)


def member(kind: type[Member], value: str, what: str) -> Member:
    """The member of an enumeration, from itself or from its text: enumerations are made where data come in.

    Args:
        kind: The enumeration.
        value: A member, or its value.
        what: Its name, for the error.

    Returns:
        The member.

    Raises:
        InputError: If there is no such member, naming those there are.

    Examples:
        >>> from emag_export.kinds import Variant, member
        >>> member(Variant, "skip", "variant")
        <Variant.SKIP: 'skip'>
    """
    try:
        return kind(value)
    except ValueError as error:
        raise InputError(f"there is no {what} {value!r}; choose {', '.join(kind)}") from error
