"""What takes part in a measurement: a method of guidance on something that runs it."""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import torch

from emag_export.bench.timing import StepTime, TimedEngine, timed_steps
from emag_export.engines.protocol import Engine
from emag_export.reference.two_pass import ReferenceStep, two_pass_denoise
from emag_export.runtime.loop import DenoiseStep, denoise
from emag_export.runtime.prepare import Prepared
from emag_export.runtime.sampling.plan import Phase, Plan, cost_of
from emag_export.runtime.sampling.pool import StatePool

__all__ = ["PYTORCH", "Contender", "forked", "two_pass"]

PYTORCH = "PyTorch eager"
"""What the unmodified diffusers model runs on."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One row of the table: something that can be run again and again."""

    method: str
    """``cfg``, a variant, or ``two-pass`` and a variant."""
    engine: str
    plan: Plan
    images: int
    device: torch.device
    repeats_model: bool
    """Every step that averages runs the whole model a second time: the released algorithm."""
    steps: Callable[[], Generator[StepTime, None, None]]
    """Starts a run."""

    @property
    def name(self) -> str:
        """Method and engine, for people."""
        return f"{self.method}, {self.engine}"

    def phases(self, steps: int | None = None) -> tuple[Phase, ...]:
        """Phases of its run, or of a run of so many steps."""
        if steps is None:
            return tuple(step.phase for step in self.plan.steps)
        perturbed = self.plan.guidance.rule.perturbed
        return self.plan.windows.phases(steps) if perturbed else (Phase.PLAIN,) * steps

    def row_blocks(self, steps: int | None = None) -> int:
        """What a run of so many steps costs for one image: blocks run for one row each."""
        phases, contract = self.phases(steps), self.plan.contract
        rules = [self.plan.guidance.rule_at(index, len(phases)) for index in range(len(phases))]
        if not self.repeats_model:
            return cost_of(contract, phases, rules).planned
        rows = [
            (1 + rule.uncond) * (1 + (phase != Phase.PLAIN))
            for phase, rule in zip(phases, rules, strict=True)
        ]
        return sum(rows) * contract.num_blocks


def forked(engine: Engine, prepared: Prepared) -> Contender:
    """Our loop on the forked graph, with whatever guidance was prepared.

    Args:
        engine: Of the denoiser, open.
        prepared: Latents and conditioning on the engine's device.
    """
    plan, timed, pool = prepared.plan, TimedEngine(engine), StatePool()

    def steps() -> Generator[StepTime, None, None]:
        given = prepared.conditioning
        with pool.lend(plan.contract, prepared.latents, given.given) as start:
            run = denoise(timed, plan, start, given, anneal=prepared.anneal, noise=prepared.noise)
            yield from timed_steps(run, _phase, engine.device, timed)

    return Contender(
        method=_method(plan),
        engine=engine.name,
        plan=plan,
        images=len(prepared.requests),
        device=engine.device,
        repeats_model=False,
        steps=steps,
    )


def two_pass(model: Any, prepared: Prepared) -> Contender:
    """The unmodified diffusers model: the released algorithm where the guidance perturbs, else a plain pass.

    The second pass is left out where nothing is averaged, which the released code does not do; so it is
    no slower than that.

    Args:
        model: In eval mode.
        prepared: Latents and conditioning on the model's device.
    """
    plan = prepared.plan

    def steps() -> Generator[StepTime, None, None]:
        run = two_pass_denoise(
            model,
            plan,
            prepared.latents,
            prepared.conditioning,
            anneal=prepared.anneal,
            noise=prepared.noise,
        )
        return timed_steps(run, _phase, prepared.latents.device)

    perturbed = plan.guidance.rule.perturbed
    return Contender(
        method=f"two-pass {_method(plan)}" if perturbed else _method(plan),
        engine=PYTORCH,
        plan=plan,
        images=len(prepared.requests),
        device=prepared.latents.device,
        repeats_model=perturbed,
        steps=steps,
    )


def _method(plan: Plan) -> str:
    """``cfg``, ``emag-q``, ``emag-q+apg``: the guidance, with the variant in place of its general name."""
    name = plan.guidance.name
    return name.replace("emag", str(plan.contract.variant), 1) if plan.guidance.rule.perturbed else name


def _phase(step: DenoiseStep | ReferenceStep) -> Phase:
    return step.plan.phase
