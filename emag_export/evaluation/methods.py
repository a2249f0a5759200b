"""Ways to guide that can be compared, by name; options may stand behind it, as in ``emag[tcfg=true]``."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from types import MappingProxyType
from typing import cast

from emag_export.errors import InputError
from emag_export.kinds import Variant, member
from emag_export.runtime.guidance.rules import GUIDANCES
from emag_export.runtime.keyword_text import keyword_fits, keyword_from
from emag_export.runtime.keywords import SAMPLING_KEYWORDS, SamplingKeywords

__all__ = ["METHODS", "Method", "method_named", "methods_named"]

_INTERVAL = (0.2, 0.8)
"""The middle of a run, as in the table of docs/concepts/guidance.md."""
_RESCALE = 0.7
"""phi of arXiv:2305.08891, section 3.4."""
_FIXED = ("guidance", "guidance_scale", "emag_scale", "steps", "height", "width", "seed", "negative_prompt")
"""Keywords that are not a method's: its rule, the scales, and what all methods share."""
_LIST = re.compile(r"\s*([^,\[\]]+(?:\[[^\]]*\])?)\s*(?:,|$)")
_ONE = re.compile(r"(?P<name>[^@\[\]]+)(?:@(?P<variant>[^@\[\]]+))?(?:\[(?P<options>[^\]]*)\])?")


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to guide."""

    keywords: SamplingKeywords
    """What makes it, scales aside."""
    scaled: bool = True
    """It has a guidance scale w."""
    variant: Variant | None = None
    """It runs with bundles of this variant alone; None is all of them."""
    summary: str

    @property
    def perturbed(self) -> bool:
        """It steers away from a hard negative, so that it has a scale s and depends on the variant."""
        return GUIDANCES[self.keywords["guidance"] or ""].perturbed


_EVERY_STEP: SamplingKeywords = {
    "emag_start": 250, "emag_delta": 0, "emag_stop": 0, "emag_unit": "250ths"
}  # fmt: skip
_NEGATIVES: Mapping[str, Method] = {
    "pag": Method(keywords={"guidance": "emag"}, variant=Variant.IDENTITY, summary="identity maps"),
    "seg": Method(keywords={"guidance": "emag"}, variant=Variant.BLUR_QUERY, summary="blurred queries"),
    "slg": Method(keywords={"guidance": "emag"}, variant=Variant.SKIP, summary="blocks left out"),
    "s2": Method(
        keywords={"guidance": "emag", "random_blocks": 1, **_EVERY_STEP},
        variant=Variant.SKIP,
        summary="a block left out in every step, another one each time",
    ),
}
"""Published methods that are one variant each; ``emag`` runs with every variant that there is a bundle of."""


def _table() -> dict[str, Method]:
    plain = {
        name: Method(keywords={"guidance": name}, scaled=rule.uncond, summary=rule.summary)
        for name, rule in sorted(GUIDANCES.items(), key=lambda item: item[0] != "none")
    }
    low, high = _INTERVAL
    interval = f"in the part of a run from {low:g} to {high:g} only"
    return {
        **plain,
        "cfg+interval": Method(
            keywords={"guidance": "cfg", "guidance_interval": _INTERVAL}, summary=f"cfg {interval}"
        ),
        "cfg+rescale": Method(
            keywords={"guidance": "cfg", "cfg_rescale": _RESCALE}, summary=f"cfg, phi {_RESCALE:g}"
        ),
        "cfg-zero-star": Method(keywords={"guidance": "cfg", "cfg_zero_star": True}, summary="CFG-Zero*"),
        "tcfg": Method(keywords={"guidance": "cfg", "tcfg": True}, summary="tangential damping"),
        **_NEGATIVES,
        "emag+interval": Method(
            keywords={"guidance": "emag", "guidance_interval": _INTERVAL}, summary=f"emag, w {interval}"
        ),
        "emag-zero-star": Method(
            keywords={"guidance": "emag", "cfg_zero_star": True}, summary="emag with CFG-Zero*"
        ),
    }


METHODS: Mapping[str, Method] = MappingProxyType(_table())
"""Every method. ``emag`` in a name stands for the hard negative of the bundle, whatever its variant is."""


@cache
def method_named(text: str) -> Method:
    """A method by its name, and what is written behind it.

    Args:
        text: A key of :data:`METHODS`; ``@VARIANT`` behind it runs it with one variant alone, and options in
            brackets set sampling keywords: ``emag@emag-q[emag-blocks=4,5 emag-strength=0.5]``.

    Raises:
        InputError: If a name, variant or option does not exist, or a value is of the wrong kind.
    """
    match = _ONE.fullmatch(text)
    if match is None or match["name"] not in METHODS:
        name = text if match is None else match["name"]
        raise InputError(f"there is no method {name!r} in `methods`; there are {', '.join(METHODS)}")
    method = METHODS[match["name"]]
    if match["variant"] is not None:
        variant = member(Variant, match["variant"], "`methods`")
        if not method.perturbed or method.variant not in (None, variant):
            raise InputError(f"{match['name']} of `methods` does not run with the variant {variant}")
        method = replace(method, variant=variant)
    if match["options"]:
        words = dict(_option(option) for option in match["options"].split())
        keywords = cast("SamplingKeywords", {**method.keywords, **words})
        method = replace(method, keywords=keywords, summary=f"{method.summary}; {match['options']}")
    return method


def _option(text: str) -> tuple[str, object]:
    name, _, value = text.partition("=")
    name = name.replace("-", "_")
    if name not in SAMPLING_KEYWORDS or name in _FIXED or not value:
        known = ", ".join(word for word in SAMPLING_KEYWORDS if word not in _FIXED)
        raise InputError(f"{text!r} in `methods` is no option; write one of {known}, as emag_strength=0.5")
    found = keyword_from(name, value)
    if not keyword_fits(name, found):
        raise InputError(f"{text!r} in `methods` is of the wrong kind")
    return name, tuple(found) if isinstance(found, list) else found


def methods_named(text: str) -> tuple[str, ...]:
    """Methods in a list with commas, each once; commas inside brackets do not count.

    Raises:
        InputError: As :func:`method_named`, or if there is none.
    """
    names, place = [], 0
    text = text.strip().rstrip(",")
    while place < len(text):
        match = _LIST.match(text, place)
        if match is None:
            raise InputError(f"`methods` cannot be read from {text[place:]!r} on; write cfg,emag[tcfg=true]")
        names.append(match[1].strip())
        place = match.end()
    if not names:
        raise InputError(f"`methods` names none; there are {', '.join(METHODS)}")
    for name in names:
        method_named(name)
    return tuple(dict.fromkeys(names))
