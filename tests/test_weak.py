"""A weaker model as the negative, against its formula written out on the two diffusers models."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from emag_export.engines.eager import EagerEngine
from emag_export.errors import InputError
from emag_export.exporter.graph.fork import Forked
from emag_export.kinds import Variant
from emag_export.runtime.guidance.rules import Guidance
from emag_export.runtime.loop import denoise
from emag_export.runtime.sampling.conditioning import Conditioning
from emag_export.runtime.sampling.plan import EmagWindows, Phase, Plan, make_plan
from emag_export.runtime.sampling.schedule import flow_match_schedule
from emag_export.runtime.sampling.state import RunState
from emag_export.runtime.weak import WeakModel
from tests.conftest import forked, small_model

IMAGES, TEXT, STEPS, W, S = 2, 5, 6, 4.0, 1.7


def forks(variant: Variant) -> tuple[Forked, Forked]:
    """A model, and one whose weights are off: what a merged LoRA, or fewer steps of training, make of it."""
    strong, weak = small_model(), small_model()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in weak.parameters():
            tensor += 0.2 * tensor.std() * torch.randn(tensor.shape, generator=generator)
    return forked(strong, variant), forked(weak, Variant.EMAG_Q)


def engine_of(fork: Forked) -> EagerEngine:
    return EagerEngine(fork, fork.contract.graph)


def rows(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "encoder_hidden_states": torch.randn(IMAGES, TEXT, 16, generator=generator),
        "pooled_projections": torch.randn(IMAGES, 8, generator=generator),
    }


def plan_of(fork: Forked, name: str) -> Plan:
    schedule = flow_match_schedule({"shift": 3.0}, STEPS, 12)
    guidance = Guidance(name=name, scale=W, emag_scale=S)
    return make_plan(fork.contract, schedule, guidance, EmagWindows(start=200, delta=0, stop=50))


@torch.no_grad()
def literally(
    strong: Any, weak: Any, plan: Plan, latents: Tensor, given: Conditioning, *, uncond: bool
) -> Tensor:
    """AutoGuidance in every step of the window, CFG around it where the rule has it."""
    for planned in plan.steps:
        time = torch.full((IMAGES,), planned.timestep)
        cond = strong(latents, timestep=time, return_dict=False, **given.given)[0]
        if planned.phase == Phase.GUIDE:
            negative = weak(latents, timestep=time, return_dict=False, **given.given)[0]
            cond = negative + S * (cond - negative)
        if uncond:
            assert given.negative is not None
            without = strong(latents, timestep=time, return_dict=False, **given.negative)[0]
            cond = without + W * (cond - without)
        latents = latents + planned.b * cond
    return latents


# Two models in float32, six steps; measured below 2e-6 on numbers up to 10.
@pytest.mark.parametrize("variant", [Variant.EMAG_Q, Variant.SKIP])
@pytest.mark.parametrize("name", ["emag", "emag-only"])
def test_the_negative_is_what_the_weak_model_predicts(variant: Variant, name: str) -> None:
    strong, weak = forks(variant)
    noise = torch.randn(IMAGES, 4, 6, 8, generator=torch.Generator().manual_seed(1))
    given = Conditioning(given=rows(2), negative=rows(3))
    plan = plan_of(strong, name)
    model = WeakModel(engine=engine_of(weak), contract=weak.contract)
    run = RunState.start(strong.contract, noise, given.given)
    *_, last = denoise(engine_of(strong), plan, run, given, weak=model)
    wanted = literally(strong.model, weak.model, plan, noise, given, uncond=name == "emag")
    torch.testing.assert_close(last.latents, wanted, rtol=0, atol=1e-4)
    *_, without = denoise(engine_of(strong), plan, RunState.start(strong.contract, noise, given.given), given)
    assert float((without.latents - last.latents).abs().max()) > 1e-2, "the weak model changes nothing"


def test_a_model_of_other_things_is_refused() -> None:
    strong, weak = forks(Variant.EMAG_Q)
    other = replace(weak.contract, latents=(8, "2*h", "2*w"), out_channels=8)
    model = WeakModel(engine=engine_of(weak), contract=other)
    given = Conditioning(given=rows(2), negative=rows(3))
    run = RunState.start(strong.contract, torch.zeros(IMAGES, 4, 6, 8), given.given)
    with pytest.raises(InputError, match="the weak model's latents differs"):
        next(denoise(engine_of(strong), plan_of(strong, "emag"), run, given, weak=model))
