"""Noise levels: diffusers' own scheduler is the oracle, and stepping with them is its ``step``."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

from emag_export.errors import InputError, ModelError
from emag_export.runtime.sampling.schedule import flow_match_schedule

CONFIGS: dict[str, dict[str, Any]] = {
    "sd3": {"shift": 3.0},
    "plain": {},
    "karras": {"shift": 3.0, "use_karras_sigmas": True},
    "dynamic": {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15},
}


@pytest.mark.parametrize("steps", [1, 2, 7, 28, 50])
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_diffusers(name: str, steps: int) -> None:
    config, tokens = CONFIGS[name], 1024
    theirs = FlowMatchEulerDiscreteScheduler(**config)
    mu = None
    if config.get("use_dynamic_shifting"):
        settings = theirs.config
        mu = calculate_shift(
            tokens,
            settings["base_image_seq_len"],
            settings["max_image_seq_len"],
            settings["base_shift"],
            settings["max_shift"],
        )
    theirs.set_timesteps(steps, mu=mu)
    ours = flow_match_schedule(config, steps, tokens)
    assert ours.steps == steps
    assert torch.equal(torch.tensor(ours.sigmas), theirs.sigmas)
    assert torch.equal(torch.tensor(ours.timesteps), theirs.timesteps.float())
    latents, velocity = torch.randn(1, 4, 3, 3), torch.randn(1, 4, 3, 3)
    stepped = theirs.step(velocity, theirs.timesteps[0], latents).prev_sample
    assert torch.equal(latents + ours.sigma_steps[0] * velocity, stepped)


def test_every_number_of_steps_ends_at_zero() -> None:
    for steps in range(1, 51):
        sigmas = flow_match_schedule(CONFIGS["sd3"], steps, 64).sigmas
        assert len(sigmas) == steps + 1
        assert sigmas[-1] == 0
        assert all(high > low for high, low in pairwise(sigmas))


@pytest.mark.parametrize("steps", [0, -3])
def test_no_steps_are_refused(steps: int) -> None:
    with pytest.raises(InputError, match="give at least 1"):
        flow_match_schedule({}, steps, 64)


@pytest.mark.parametrize(
    "config",
    [{"stochastic_sampling": True}, {"invert_sigmas": True}, {"_class_name": "DDIMScheduler"}],
)
def test_other_schedulers_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="supported"):
        flow_match_schedule(config, 4, 64)
