"""Guidance: how the predictions of one step become one velocity. Pure functions and one table."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from emag_export.errors import InputError
from emag_export.runtime.checks import require_finite, require_range
from emag_export.runtime.guidance.apg import ApgConfig, ApgTerms, apg
from emag_export.runtime.guidance.cads import CadsConfig
from emag_export.runtime.guidance.clean import Clean, Number
from emag_export.runtime.guidance.interval import WHOLE_RUN, in_interval, require_interval
from emag_export.runtime.guidance.norm import keep_norm
from emag_export.runtime.guidance.rescale import rescale
from emag_export.runtime.guidance.tangential import tangential
from emag_export.runtime.guidance.zero_star import optimised_scale

__all__ = [
    "GUIDANCES",
    "Guidance",
    "GuidanceRule",
    "Predictions",
    "Rows",
    "Terms",
    "cfg",
    "combine",
    "emag",
    "unperturbed",
]

Rows = Float[Tensor, "images channels *sides"]
"""One prediction, or the latents, of every image."""


def cfg(uncond: Rows, cond: Rows, scale: Number) -> Rows:
    r"""Classifier-free guidance: :math:`u + w\,(c - u)`.

    Args:
        uncond: Velocity without the prompt, latent units per unit sigma.
        cond: Velocity given the prompt, same units.
        scale: :math:`w`, dimensionless; 1 returns ``cond``.

    Returns:
        The guided velocity, same units.

    Examples:
        >>> import torch
        >>> from emag_export.runtime.guidance.rules import cfg
        >>> u, c = torch.zeros(1, 4, 8, 8), torch.ones(1, 4, 8, 8)
        >>> cfg(u, c, 7.0).unique()
        tensor([7.])

    Source:
        arXiv:2207.12598, eq. 6, in the form whose scale 1 is no guidance.
    """
    return uncond + scale * (cond - uncond)


def emag(cond: Rows, perturbed: Rows, scale: Number) -> Rows:
    r"""Move the conditional prediction away from its hard negative: :math:`p + s\,(c - p)`.

    Args:
        cond: Velocity given the prompt, latent units per unit sigma.
        perturbed: Velocity with one block's attention replaced by its moving average, same units.
        scale: :math:`s`, dimensionless; 1 returns ``cond``, so the result is plain CFG.

    Returns:
        The conditional velocity to guide with, same units.

    Examples:
        >>> import torch
        >>> from emag_export.runtime.guidance.rules import emag
        >>> c, p = torch.ones(1, 4, 8, 8), torch.full((1, 4, 8, 8), 0.5)
        >>> emag(c, p, 1.5).unique()
        tensor([1.2500])

    Source:
        arXiv:2512.17303, eq. 14 (v2 numbering).
    """
    return perturbed + scale * (cond - perturbed)


@dataclass(frozen=True, kw_only=True)
class GuidanceRule:
    """Which predictions a guidance needs and what is done with them, in a run or in one step of it."""

    uncond: bool = True
    perturbed: bool = False
    apg: bool = False
    cads: bool = False
    tangential: bool = False
    """TCFG: the unconditional prediction is damped first."""
    zero_star: bool = False
    """CFG-Zero*: the unconditional prediction is then scaled to fit the conditional one."""
    rescaled: bool = False
    """The result is brought back to the spread of the conditional prediction."""
    patch: tuple[int, ...] | None = None
    """Latents of an image token along every side, where each gets the length that it has in the conditional
    prediction; None where it need not."""
    zeroed: bool = False
    """The first steps of CFG-Zero*: the result is 0."""
    channels: int | None = None
    """All this holds for the first so many channels; the others are the conditional prediction's."""
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
        "none": GuidanceRule(uncond=False, summary="c, one row; what a distilled model is made for"),
    }
)
"""Name to what is done with the predictions of a step."""


def unperturbed(name: str) -> str:
    """A guidance without its hard negative: CFG, or ``none`` where there is no unconditional row.

    Args:
        name: In :data:`GUIDANCES`.

    Examples:
        >>> from emag_export.runtime.guidance.rules import unperturbed
        >>> unperturbed("emag+apg"), unperturbed("emag-only")
        ('cfg', 'none')
    """
    return "cfg" if GUIDANCES[name].uncond else "none"


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """A named rule and its scales; the defaults are the paper's for SD3-medium.

    Examples:
        >>> from emag_export.runtime.guidance.rules import Guidance
        >>> guidance = Guidance(name="emag", scale=4.0, interval=(0.2, 0.8), rescale=0.7)
        >>> guidance.modifiers
        ('interval 0.2 to 0.8', 'rescale 0.7')
        >>> [guidance.rule_at(index, 28).uncond for index in (0, 14, 27)]  # is an unconditional row sent?
        [False, True, False]
    """

    name: str = "emag"
    scale: float = 7.0
    """w, of CFG. APG has its own."""
    emag_scale: float = 1.5
    """s, of EMAG."""
    apg: ApgConfig = field(default_factory=ApgConfig)
    cads: CadsConfig = field(default_factory=CadsConfig)
    interval: tuple[float, float] = WHOLE_RUN
    """Where w of CFG or APG counts, low and high: fractions of the run, 0 the first step and 1 the last.
    Elsewhere w is 1 and no unconditional row is sent; see :mod:`emag_export.runtime.guidance.interval`."""
    rescale: float = 0.0
    """phi of rescaled CFG: 0 is none, 1 keeps the spread of the conditional prediction."""
    norm: bool = False
    """Every image token of the result gets the length that it has in the conditional prediction."""
    zero_star: bool = False
    """CFG-Zero*."""
    zero_init: int = 1
    """K: with CFG-Zero*, the prediction of the first so many steps is replaced by 0."""
    tangential: bool = False
    """TCFG."""
    guided_channels: int | None = None
    """Guide the first so many channels of the prediction and take the others from the conditional one, as the
    released DiT does with 3 of 4; None guides all."""

    def __post_init__(self) -> None:
        if self.name not in GUIDANCES:
            raise InputError(f"there is no `guidance` {self.name!r}; choose from {', '.join(GUIDANCES)}")
        require_finite(guidance_scale=self.scale, emag_scale=self.emag_scale)
        require_interval(self.interval)
        require_range(0.0, 1.0, cfg_rescale=self.rescale)
        if self.zero_init < 0:
            raise InputError(f"`cfg_zero_init` is {self.zero_init}; give a number of steps, 0 or more")
        if self.guided_channels is not None and self.guided_channels < 1:
            raise InputError(
                f"`guided_channels` is {self.guided_channels}; give 1 or more, or leave it out for all"
            )

    @property
    def rule(self) -> GuidanceRule:
        """The row of the table, with what this guidance adds to it; ``patch`` is for a plan to say."""
        return replace(
            GUIDANCES[self.name],
            tangential=self.tangential,
            zero_star=self.zero_star,
            rescaled=self.rescale > 0,
            channels=self.guided_channels,
        )

    @property
    def modifiers(self) -> tuple[str, ...]:
        """What is added to the row of the table, for people."""
        low, high = self.interval
        given = {
            f"interval {low:g} to {high:g}": self.interval != WHOLE_RUN,
            "TCFG": self.tangential,
            f"CFG-Zero*, {self.zero_init} zero steps": self.zero_star,
            f"rescale {self.rescale:g}": self.rescale > 0,
            "norm of c": self.norm,
            f"first {self.guided_channels} channels": self.guided_channels is not None,
        }
        return tuple(name for name, is_given in given.items() if is_given)

    def rule_at(self, index: int, steps: int) -> GuidanceRule:
        """The rule of one step; it asks for no unconditional prediction where that would not be used.

        Args:
            index: Of the step, from 0.
            steps: Of the run.
        """
        rule, zeroed = self.rule, self.zero_star and index < self.zero_init
        guided = in_interval(index, steps, self.interval) and not zeroed
        return replace(rule, uncond=rule.uncond and guided, zeroed=zeroed)


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What the model predicts at one step, float32: velocities, latent units per unit sigma, or epsilon."""

    uncond: Rows | None
    cond: Rows
    perturbed: Rows
    """Equal to ``cond`` outside the perturb window."""

    def select(self, images: Int[Tensor, " selected"]) -> "Predictions":
        """Those of some images.

        Args:
            images: Their places, from 0.
        """
        uncond, cond = self.uncond, self.cond.index_select(0, images)
        return Predictions(
            uncond=None if uncond is None else uncond.index_select(0, images),
            cond=cond,
            perturbed=cond if self.perturbed is self.cond else self.perturbed.index_select(0, images),
        )

    def first(self, channels: int) -> "Predictions":
        """Their first so many channels.

        Args:
            channels: How many.
        """
        cond = self.cond[:, :channels]
        return Predictions(
            uncond=None if self.uncond is None else self.uncond[:, :channels],
            cond=cond,
            perturbed=cond if self.perturbed is self.cond else self.perturbed[:, :channels],
        )


@dataclass(frozen=True, kw_only=True)
class Terms:
    """Numbers of :func:`combine` at one step, for all images or one each."""

    scale: Number
    emag_scale: Number
    rescale: Number
    """phi."""
    apg: ApgTerms
    clean: Clean

    @classmethod
    def of(cls, guidance: Guidance, clean: Clean) -> Self:
        """The same for all images.

        Args:
            guidance: With the scales.
            clean: Coefficients of the step.
        """
        return cls(
            scale=guidance.scale,
            emag_scale=guidance.emag_scale,
            rescale=guidance.rescale,
            apg=guidance.apg.terms,
            clean=clean,
        )


def combine(
    rule: GuidanceRule, terms: Terms, predictions: Predictions, latents: Rows, momentum: Rows
) -> tuple[Rows, Rows]:
    """The prediction to step along, and APG's momentum for the next step.

    Args:
        rule: What is done.
        terms: With which numbers.
        predictions: Of this step.
        latents: x of this step; only APG looks at it.
        momentum: Result of the previous step, zeros at the first. Without an unconditional prediction, and
            in channels that are not guided, it stays as it is.

    Returns:
        The guided prediction, in the units of the predictions, and the momentum, in latent units.

    Examples:
        >>> import torch
        >>> from emag_export.runtime.guidance.clean import Clean
        >>> from emag_export.runtime.guidance.rules import Guidance, Predictions, Terms, combine
        >>> x, u, c, p = (torch.full((1, 4, 8, 8), value) for value in (3.0, 0.0, 1.0, 0.5))
        >>> guidance = Guidance(name="emag", scale=4.0, emag_scale=1.5)
        >>> terms = Terms.of(guidance, Clean.of(1.0, -0.5))
        >>> predictions = Predictions(uncond=u, cond=c, perturbed=p)
        >>> guided, momentum = combine(guidance.rule, terms, predictions, x, torch.zeros_like(x))
        >>> guided.unique()  # 0 + 4 (0.5 + 1.5 (1 - 0.5) - 0)
        tensor([5.])
    """
    channels = rule.channels
    if channels is None or channels >= latents.shape[1]:
        return _combined(rule, terms, predictions, latents, momentum)
    guided, moved = _combined(
        rule, terms, predictions.first(channels), latents[:, :channels], momentum[:, :channels]
    )
    whole = torch.cat([guided, predictions.cond[:, channels:]], dim=1)
    return whole, torch.cat([moved, momentum[:, channels:]], dim=1)


def _combined(
    rule: GuidanceRule, terms: Terms, predictions: Predictions, latents: Rows, momentum: Rows
) -> tuple[Rows, Rows]:
    """The same, all channels being guided. The order of what is added to a rule is that of its fields."""
    uncond, cond = predictions.uncond, predictions.cond
    guided = emag(cond, predictions.perturbed, terms.emag_scale) if rule.perturbed else cond
    if uncond is not None and rule.uncond:
        if rule.tangential:
            uncond = tangential(cond, uncond)
        if rule.zero_star:
            uncond = optimised_scale(cond, uncond) * uncond
        if rule.apg:
            guided, momentum = apg(latents, guided, uncond, momentum, terms.clean, terms.apg)
        else:
            guided = cfg(uncond, guided, terms.scale)
    if rule.rescaled:
        guided = rescale(guided, cond, terms.rescale)
    if rule.patch is not None:
        guided = keep_norm(guided, cond, rule.patch)
    return torch.zeros_like(guided) if rule.zeroed else guided, momentum
