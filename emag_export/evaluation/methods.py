"""The methods that can be compared, by name, and the settings at which each is run."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from emag_export.bundle import Bundle
from emag_export.errors import InputError
from emag_export.kinds import Variant
from emag_export.runtime.guidance.rules import GUIDANCES
from emag_export.runtime.keywords import SamplingKeywords

__all__ = ["METHODS", "Method", "Setting", "bundle_for", "methods_named", "settings_of"]

_NEVER = (1e-9, 1e-9)
"""An interval without any step, so that no unconditional row is sent and nothing is paid for it."""
_INTERVAL = (0.2, 0.8)
"""The middle of a run, as in the table of docs/guidance.md."""
_RESCALE = 0.7
"""phi of arXiv:2305.08891, section 3.4."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to guide."""

    keywords: SamplingKeywords
    """What makes it, scales aside."""
    scaled: bool = True
    """It has a guidance scale w."""
    summary: str

    @property
    def perturbed(self) -> bool:
        """It steers away from a hard negative, so that it has a scale s and depends on the variant."""
        return GUIDANCES[self.keywords["guidance"] or ""].perturbed


def _table() -> dict[str, Method]:
    plain = {
        name: Method(keywords={"guidance": name}, scaled=rule.uncond, summary=rule.summary)
        for name, rule in GUIDANCES.items()
    }
    none: SamplingKeywords = {"guidance": "cfg", "guidance_scale": 1.0, "guidance_interval": _NEVER}
    low, high = _INTERVAL
    interval = f"in the part of a run from {low:g} to {high:g} only"
    return {
        "none": Method(keywords=none, scaled=False, summary="c, no guidance at all"),
        **plain,
        "cfg+interval": Method(
            keywords={"guidance": "cfg", "guidance_interval": _INTERVAL}, summary=f"cfg {interval}"
        ),
        "cfg+rescale": Method(
            keywords={"guidance": "cfg", "cfg_rescale": _RESCALE}, summary=f"cfg, phi {_RESCALE:g}"
        ),
        "cfg-zero-star": Method(keywords={"guidance": "cfg", "cfg_zero_star": True}, summary="CFG-Zero*"),
        "tcfg": Method(keywords={"guidance": "cfg", "tcfg": True}, summary="tangential damping"),
        "emag+interval": Method(
            keywords={"guidance": "emag", "guidance_interval": _INTERVAL}, summary=f"emag, w {interval}"
        ),
        "emag-zero-star": Method(
            keywords={"guidance": "emag", "cfg_zero_star": True}, summary="emag with CFG-Zero*"
        ),
    }


METHODS: Mapping[str, Method] = MappingProxyType(_table())
"""Every method. ``emag`` in a name stands for the hard negative of the bundle, whatever its variant is."""


def methods_named(text: str) -> tuple[str, ...]:
    """Names in a list with commas, each once.

    Raises:
        InputError: If one does not exist, or there is none.
    """
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if unknown := [name for name in names if name not in METHODS]:
        raise InputError(f"there is no method {unknown[0]!r} in `methods`; there are {', '.join(METHODS)}")
    if not names:
        raise InputError(f"`methods` names none; there are {', '.join(METHODS)}")
    return names


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A method at its scales, with one variant of the model."""

    method: str
    variant: Variant | None
    """None where there is no perturbed row, so that every variant draws the same."""
    scale: float | None
    """w; None where the method has none."""
    emag_scale: float | None
    """s; None where the method has none."""

    @property
    def series(self) -> str:
        """Method and variant, for people."""
        return self.method if self.variant is None else f"{self.method} ({self.variant})"

    @property
    def label(self) -> str:
        """Everything, for people: ``emag (emag-q), w 7, s 1.5``."""
        scales = {"w": self.scale, "s": self.emag_scale}
        return ", ".join([self.series, *(f"{n} {v:g}" for n, v in scales.items() if v is not None)])

    @property
    def folder(self) -> str:
        """Everything, as the name of a folder."""
        scales = {"w": self.scale, "s": self.emag_scale}
        variant = [] if self.variant is None else [str(self.variant)]
        return "-".join([self.method, *variant, *(f"{n}{v:g}" for n, v in scales.items() if v is not None)])

    @property
    def keywords(self) -> SamplingKeywords:
        """What makes its pictures."""
        words: SamplingKeywords = {**METHODS[self.method].keywords}
        if self.scale is not None:
            words["guidance_scale"] = self.scale
        if self.emag_scale is not None:
            words["emag_scale"] = self.emag_scale
        return words


def bundle_for(setting: Setting, bundles: Sequence[Bundle]) -> Bundle:
    """The bundle that draws a setting: that of its variant, the first where any will do."""
    return next(
        bundle for bundle in bundles if setting.variant is None or bundle.contract.variant == setting.variant
    )


def settings_of(
    names: Sequence[str],
    bundles: Sequence[Bundle],
    scales: Sequence[float] = (),
    emag_scales: Sequence[float] = (),
) -> list[Setting]:
    """All settings that are to be compared: methods, variants and scales.

    Args:
        names: Keys of :data:`METHODS`.
        bundles: Variants of one model. Methods without a perturbed row run with the first alone.
        scales: w of every method that has one; none is the bundle's own.
        emag_scales: s, likewise.
    """
    return [setting for name in names for setting in _settings(name, bundles, scales, emag_scales)]


def _settings(
    name: str, bundles: Sequence[Bundle], scales: Sequence[float], emag_scales: Sequence[float]
) -> Iterator[Setting]:
    method = METHODS[name]
    for bundle in bundles if method.perturbed else bundles[:1]:
        defaults = bundle.defaults
        own = defaults.apg_scale if GUIDANCES[method.keywords["guidance"] or ""].apg else None
        first: Sequence[float | None] = scales or [defaults.guidance_scale if own is None else own]
        second: Sequence[float | None] = emag_scales or [defaults.emag_scale]
        for scale in first if method.scaled else [None]:
            for emag_scale in second if method.perturbed else [None]:
                yield Setting(
                    method=name,
                    variant=bundle.contract.variant if method.perturbed else None,
                    scale=scale,
                    emag_scale=emag_scale,
                )
