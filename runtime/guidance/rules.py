"""Guidance: how the predictions of one step become one velocity. Pure functions and one table."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Self

from jaxtyping import Float, Int
from torch import Tensor

from emag_export.errors import InputError
from emag_export.runtime.checks import require_finite
from emag_export.runtime.guidance.apg import ApgConfig, ApgTerms, apg
from emag_export.runtime.guidance.cads import CadsConfig
from emag_export.runtime.guidance.clean import Clean, Number

__all__ = ["GUIDANCES", "Guidance", "GuidanceRule", "Predictions", "Rows", "Terms", "cfg", "combine", "emag"]

Rows = Float[Tensor, "images channels *sides"]


def cfg(uncond: Rows, cond: Rows, scale: Number) -> Rows:
    r"""Classifier-free guidance: :math:`u + w\,(c - u)`.

    Args:
        uncond: Velocity without the prompt, latent units per unit sigma.
        cond: Velocity given the prompt, same units.
        scale: :math:`w`; 1 returns ``cond``.

    Source:
        arXiv:2207.12598, eq. 6, in the form whose scale 1 is no guidance.
    """
    return uncond + scale * (cond - uncond)


def emag(cond: Rows, perturbed: Rows, scale: Number) -> Rows:
    r"""Move the conditional prediction away from its hard negative: :math:`p + s\,(c - p)`.

    Args:
        cond: Velocity given the prompt, latent units per unit sigma.
        perturbed: Velocity with one block's attention replaced by its moving average, same units.
        scale: :math:`s`; 1 returns ``cond``, so the result is plain CFG.

    Source:
        arXiv:2512.17303, eq. 14 (v2 numbering).
    """
    return perturbed + scale * (cond - perturbed)


@dataclass(frozen=True, kw_only=True)
class GuidanceRule:
    """Which predictions a guidance needs and what is done with them."""

    uncond: bool = True
    perturbed: bool = False
    apg: bool = False
    cads: bool = False
    summary: str


GUIDANCES: Mapping[str, GuidanceRule] = MappingProxyType(
    {
        "cfg": GuidanceRule(summary="u + w(c - u)"),
        "emag": GuidanceRule(perturbed=True, summary="ĉ = p + s(c - p), then u + w(ĉ - u)"),
        "emag-only": GuidanceRule(uncond=False, perturbed=True, summary="p + s(c - p), no unconditional row"),
        "emag+apg": GuidanceRule(perturbed=True, apg=True, summary="ĉ, then adaptive projected guidance"),
        "emag+cads": GuidanceRule(perturbed=True, cads=True, summary="emag on the annealed prompt"),
        "apg": GuidanceRule(apg=True, summary="adaptive projected guidance of (c, u)"),
        "cads": GuidanceRule(cads=True, summary="cfg on the annealed prompt"),
    }
)


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """A named rule and its scales; the defaults are the paper's for SD3-medium."""

    name: str = "emag"
    scale: float = 7.0
    """w, of CFG. APG has its own."""
    emag_scale: float = 1.5
    """s, of EMAG."""
    apg: ApgConfig = field(default_factory=ApgConfig)
    cads: CadsConfig = field(default_factory=CadsConfig)

    def __post_init__(self) -> None:
        if self.name not in GUIDANCES:
            raise InputError(f"there is no `guidance` {self.name!r}; choose from {', '.join(GUIDANCES)}")
        require_finite(guidance_scale=self.scale, emag_scale=self.emag_scale)

    @property
    def rule(self) -> GuidanceRule:
        """The row of the table."""
        return GUIDANCES[self.name]


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What the model predicts at one step, float32: velocities, latent units per unit sigma, or epsilon."""

    uncond: Rows | None
    cond: Rows
    perturbed: Rows
    """Equal to ``cond`` outside the perturb window."""

    def select(self, images: Int[Tensor, " selected"]) -> "Predictions":
        """Those of some images."""
        uncond, cond = self.uncond, self.cond.index_select(0, images)
        return Predictions(
            uncond=None if uncond is None else uncond.index_select(0, images),
            cond=cond,
            perturbed=cond if self.perturbed is self.cond else self.perturbed.index_select(0, images),
        )


@dataclass(frozen=True, kw_only=True)
class Terms:
    """Numbers of :func:`combine` at one step, for all images or one each."""

    scale: Number
    emag_scale: Number
    apg: ApgTerms
    clean: Clean

    @classmethod
    def of(cls, guidance: Guidance, clean: Clean) -> Self:
        """The same for all images."""
        return cls(scale=guidance.scale, emag_scale=guidance.emag_scale, apg=guidance.apg.terms, clean=clean)


def combine(
    rule: GuidanceRule, terms: Terms, predictions: Predictions, latents: Rows, momentum: Rows
) -> tuple[Rows, Rows]:
    """The prediction to step along, and APG's momentum for the next step.

    Args:
        rule: What is done.
        terms: With which numbers.
        predictions: Of this step.
        latents: x of this step; only APG looks at it.
        momentum: Result of the previous step, zeros at the first.
    """
    uncond, cond = predictions.uncond, predictions.cond
    if rule.perturbed:
        cond = emag(cond, predictions.perturbed, terms.emag_scale)
    if uncond is None or not rule.uncond:
        return cond, momentum
    if not rule.apg:
        return cfg(uncond, cond, terms.scale), momentum
    return apg(latents, cond, uncond, momentum, terms.clean, terms.apg)
