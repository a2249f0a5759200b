"""The settings at which methods are run: variants of a model, and scales."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from emag_export.bundle import Bundle
from emag_export.errors import InputError
from emag_export.evaluation.methods import method_named
from emag_export.kinds import Variant
from emag_export.runtime.guidance.rules import GUIDANCES
from emag_export.runtime.keywords import SamplingKeywords

__all__ = ["Setting", "bundle_for", "settings_of"]


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
        if self.variant is None or method_named(self.method).variant is not None:
            return self.method  # which says the variant
        return f"{self.method} ({self.variant})"

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
        name = re.sub(r"[^\w.+=,-]+", "_", self.method).strip("_")
        return "-".join([name, *variant, *(f"{n}{v:g}" for n, v in scales.items() if v is not None)])

    @property
    def keywords(self) -> SamplingKeywords:
        """What makes its pictures."""
        words: SamplingKeywords = {**method_named(self.method).keywords}
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
        names: Methods, as :func:`~.methods.method_named` reads them.
        bundles: Variants of one model. Methods without a perturbed row run with the first alone.
        scales: w of every method that has one; none is the bundle's own.
        emag_scales: s, likewise.

    Raises:
        InputError: If no bundle is of the variant that a method runs with.
    """
    return [setting for name in names for setting in _settings(name, bundles, scales, emag_scales)]


def _settings(
    name: str, bundles: Sequence[Bundle], scales: Sequence[float], emag_scales: Sequence[float]
) -> Iterator[Setting]:
    method = method_named(name)
    own = [bundle for bundle in bundles if method.variant in (None, bundle.contract.variant)]
    if not own:
        raise InputError(
            f"{name} of `methods` runs with the variant {method.variant}, and no bundle is of it; "
            f"build one of the same model and give it too"
        )
    for bundle in own if method.perturbed else own[:1]:
        defaults = bundle.defaults
        apg = defaults.apg_scale if GUIDANCES[method.keywords["guidance"] or ""].apg else None
        first: Sequence[float | None] = scales or [defaults.guidance_scale if apg is None else apg]
        second: Sequence[float | None] = emag_scales or [defaults.emag_scale]
        for scale in first if method.scaled else [None]:
            for emag_scale in second if method.perturbed else [None]:
                yield Setting(
                    method=name,
                    variant=bundle.contract.variant if method.perturbed else None,
                    scale=scale,
                    emag_scale=emag_scale,
                )
