"""The plan of a run: in which phase every step is, and what that costs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from emag_export.contract import DenoiserContract
from emag_export.errors import InputError
from emag_export.runtime.checks import require_finite, require_range
from emag_export.runtime.guidance.rules import Guidance, GuidanceRule
from emag_export.runtime.sampling.schedule import Schedule
from emag_export.runtime.sampling.select import Choice, Choose, always, by_delta

__all__ = [
    "Cost",
    "EmagWindows",
    "Phase",
    "Plan",
    "PlannedStep",
    "Unit",
    "cost_of",
    "make_plan",
    "window_index",
]

_WINDOW_BASE = 250


class Phase(StrEnum):
    """What a step does with the conditional row besides predicting."""

    PLAIN = "plain"
    """Nothing."""
    TRACK = "track"
    """Move the averages; only for kinds of negatives that have some."""
    GUIDE = "guide"
    """Perturb, in a row of its own, and move the averages where there are some."""


class Unit(StrEnum):
    """In which a window is given, counted from the end of the run."""

    RUN = "250ths"
    """250ths of the run, whatever its number of steps."""
    STEPS = "steps"
    """Steps of the sampler."""


@dataclass(frozen=True, kw_only=True)
class EmagWindows:
    """When averages are moved and when a row is perturbed, counted from the end of the run; and how much.

    Examples:
        >>> from emag_export.runtime.sampling.plan import EmagWindows
        >>> phases = EmagWindows().phases(28)
        >>> {str(phase): phases.count(phase) for phase in phases}
        {'track': 5, 'guide': 18, 'plain': 5}
    """

    beta: float = 0.988
    """Decay of the moving average per step."""
    start: int = 250
    """Accumulation begins here."""
    delta: int = 50
    """Perturbation begins this much later."""
    stop: int = 50
    """Both end here; 0 is the last step."""
    strength: float = 1.0
    """lambda: 1 perturbs wholly, 0 not at all."""
    unit: Unit = Unit.RUN
    """Of ``start``, ``delta`` and ``stop``."""
    blur_sigma: float | None = None
    """Of the negative ``blur-query``, in image tokens; None, or infinity, takes their mean, 0 blurs none."""

    def __post_init__(self) -> None:
        if self.blur_sigma is not None:
            require_range(0.0, math.inf, blur_sigma=self.blur_sigma)
            if math.isinf(self.blur_sigma):  # JSON has none
                object.__setattr__(self, "blur_sigma", None)
        require_range(0.0, 1.0, emag_beta=self.beta, emag_strength=self.strength)
        require_finite(emag_start=self.start, emag_delta=self.delta, emag_stop=self.stop)
        if self.delta < 0:
            raise InputError(
                f"`emag_delta` is {self.delta}; perturbation cannot begin before accumulation, give 0 or more"
            )

    def phases(self, steps: int) -> tuple[Phase, ...]:
        """Phase of each of ``steps`` steps, the noisiest first.

        Args:
            steps: Of the run.

        Source:
            The released code of arXiv:2512.17303, including Python's rounding of halves to even.
        """
        start, delta, stop = (self._left(x, steps) for x in (self.start, self.delta, self.stop))
        left = range(steps - 1, -1, -1)
        return tuple(
            Phase.PLAIN if not stop <= i <= start else Phase.GUIDE if i <= start - delta else Phase.TRACK
            for i in left
        )

    def _left(self, position: int, steps: int) -> int:
        if self.unit == Unit.STEPS:
            return max(0, min(steps - 1, position))
        return window_index(position, steps)


def window_index(position: float, steps: int) -> int:
    """Steps left to go at ``position`` 250ths of a run of ``steps`` steps, within 0 … steps-1.

    Args:
        position: Before the end of the run, in 250ths of it.
        steps: Of the run.

    Examples:
        >>> from emag_export.runtime.sampling.plan import window_index
        >>> window_index(250, 28), window_index(50, 28), window_index(0, 28)
        (27, 5, 0)
    """
    return max(0, min(steps - 1, round(position * (steps - 1) / _WINDOW_BASE)))


@dataclass(frozen=True, kw_only=True)
class PlannedStep:
    """Everything about one step that is known before the run."""

    index: int
    phase: Phase
    rule: GuidanceRule
    """What is done with the predictions of this step; it asks only for those that are used."""
    timestep: float
    sigma: float
    """Noise level before the step, for people."""
    ema_step: float
    """a in E + a (X - E): 1 starts the average, 1 - beta continues it, 0 holds it."""
    starts_average: bool
    """The first accumulation: there is no older average to differ from, so Delta is 0."""
    strength: float
    """lambda of the blocks that are perturbed; 0 outside the perturb window."""
    blur_sigma: float
    """Of the negative ``blur-query``, in image tokens."""
    choice: Choice
    """Which blocks those are, where it is known before the run."""
    a: float
    """x' = a x + b prediction."""
    b: float
    p: float
    """x0 = p x + q prediction."""
    q: float
    log_variance: tuple[float, float] | None
    """Bounds of the log of the variance of the noise that is added; None where none is."""

    @property
    def rows(self) -> tuple[int, int]:
        """Trunk rows and branch rows that one image sends in this step."""
        trunk = 1 + self.rule.uncond
        return trunk, trunk + (self.phase == Phase.GUIDE)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Row-blocks of a run for one image: one transformer block run for one row."""

    planned: int
    cfg: int
    """Classifier-free guidance in every step."""
    own: int
    """The model's own guidance in every step: CFG, or one row where guidance was distilled into it."""
    two_pass: int
    """The released algorithm: the same rows again in a second pass at every step."""

    @property
    def relative_to_cfg(self) -> float:
        """1.241 for SD3-medium at 28 steps."""
        return self.planned / self.cfg

    @property
    def relative_to_own(self) -> float:
        """1.485 for Flux.1-dev at 28 steps, whose own guidance is one row."""
        return self.planned / self.own

    @property
    def relative_to_two_pass(self) -> float:
        """Below 1 is what the fork saves."""
        return self.planned / self.two_pass


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A whole run: its steps, its guidance and the graph it is for."""

    contract: DenoiserContract
    guidance: Guidance
    windows: EmagWindows
    steps: tuple[PlannedStep, ...]
    distilled: bool = False
    """The model's own guidance is one row per image."""

    @property
    def cost(self) -> Cost:
        """Row-blocks of this run."""
        phases, rules = [step.phase for step in self.steps], [step.rule for step in self.steps]
        return cost_of(self.contract, phases, rules, distilled=self.distilled)


def cost_of(
    contract: DenoiserContract,
    phases: Sequence[Phase],
    rules: GuidanceRule | Sequence[GuidanceRule],
    *,
    distilled: bool = False,
) -> Cost:
    """Row-blocks for one image, next to plain CFG and to two full passes per step.

    Args:
        contract: Of the graph.
        phases: One per step.
        rules: One for all steps, or one per step.
        distilled: The model's own guidance is one row per image.

    Returns:
        Counts, of which ratios depend on no machine.

    Examples:
        >>> from emag_export import Bundle
        >>> from emag_export.runtime.guidance.rules import GUIDANCES
        >>> from emag_export.runtime.sampling.plan import EmagWindows, cost_of
        >>> cost = cost_of(Bundle("bundle").contract, EmagWindows().phases(28), GUIDANCES["emag"])
        >>> cost.planned, cost.cfg, cost.two_pass, cost.relative_to_cfg
        (686, 560, 1120, 1.225)
    """
    blocks, steps = contract.num_blocks, len(phases)
    of_steps = [rules] * steps if isinstance(rules, GuidanceRule) else rules
    whole = [(1 + rule.uncond) * blocks for rule in of_steps]
    forked = sum(phase == Phase.GUIDE for phase in phases) * (blocks - contract.fork)
    return Cost(
        planned=sum(whole) + forked,
        cfg=steps * 2 * blocks,
        own=steps * (1 if distilled else 2) * blocks,
        two_pass=sum(one * (1 + rule.perturbed) for one, rule in zip(whole, of_steps, strict=True)),
    )


def _require_fit(guidance: Guidance, contract: DenoiserContract, steps: int) -> None:
    """Refuse guidance that the model, or a run of so many steps, cannot have."""
    if guidance.guided_channels is not None and guidance.guided_channels > contract.channels:
        raise InputError(
            f"`guided_channels` is {guidance.guided_channels}; the model has {contract.channels}: give fewer"
        )
    if not guidance.zero_star or guidance.zero_init == 0:
        return
    if contract.prediction != "velocity":
        raise InputError(
            f"`cfg_zero_init` is {guidance.zero_init}; this model predicts {contract.prediction}, and only a "
            "velocity of 0 leaves latents as they are: give 0"
        )
    if guidance.zero_init >= steps:
        raise InputError(
            f"`cfg_zero_init` is {guidance.zero_init} of {steps} steps, which would leave noise; give fewer"
        )


def _rule_of(contract: DenoiserContract, guidance: Guidance, index: int, steps: int) -> GuidanceRule:
    """Of one step, with what it must know of the model."""
    rule = guidance.rule_at(index, steps)
    return replace(rule, patch=contract.patch) if guidance.norm else rule


def make_plan(
    contract: DenoiserContract,
    schedule: Schedule,
    guidance: Guidance,
    windows: EmagWindows | None = None,
    choose: Choose | None = None,
) -> Plan:
    """Lay out every step of a run.

    Args:
        contract: Of the graph that will run.
        schedule: Coefficients of the sampler.
        guidance: Without a perturbed prediction every step is plain.
        windows: When to average and perturb.
        choose: Which blocks are perturbed; None leaves it to the kind of negative: the lagged argmax of those
            that average, all candidates of the others.

    Returns:
        A step's phase, rule, coefficients and choice, for all steps.

    Raises:
        InputError: If model or steps cannot have this guidance.

    Examples:
        >>> from emag_export import Bundle
        >>> from emag_export.runtime.guidance.rules import Guidance
        >>> from emag_export.runtime.sampling.plan import make_plan
        >>> from emag_export.runtime.sampling.schedule import flow_match_schedule
        >>> schedule = flow_match_schedule({"shift": 3.0}, steps=28, image_tokens=64)
        >>> plan = make_plan(Bundle("bundle").contract, schedule, Guidance(name="emag"))
        >>> str(plan.steps[10].phase), plan.steps[10].rows  # trunk rows and branch rows of one image
        ('guide', (2, 3))
    """
    _require_fit(guidance, contract, schedule.steps)
    windows = windows or EmagWindows()
    phases = windows.phases(schedule.steps) if guidance.rule.perturbed else (Phase.PLAIN,) * schedule.steps
    averages = contract.kind.averages is not None
    if choose is None:
        choose = by_delta if averages else always(contract.blocks, contract.blocks)
    if not averages:
        phases = tuple(Phase.PLAIN if phase == Phase.TRACK else phase for phase in phases)
    variance = schedule.log_variance or (None,) * schedule.steps
    steps, started = [], False
    for index, phase in enumerate(phases):
        tracking = averages and phase != Phase.PLAIN
        steps.append(
            PlannedStep(
                index=index,
                phase=phase,
                rule=_rule_of(contract, guidance, index, schedule.steps),
                timestep=schedule.timesteps[index],
                sigma=schedule.sigmas[index],
                ema_step=0.0 if not tracking else 1 - windows.beta if started else 1.0,
                starts_average=tracking and not started,
                strength=windows.strength if phase == Phase.GUIDE else 0.0,
                blur_sigma=math.inf if windows.blur_sigma is None else windows.blur_sigma,
                choice=choose(index),
                a=schedule.a[index],
                b=schedule.b[index],
                p=schedule.p[index],
                q=schedule.q[index],
                log_variance=variance[index],
            )
        )
        started = started or tracking
    return Plan(contract=contract, guidance=guidance, windows=windows, steps=tuple(steps))
