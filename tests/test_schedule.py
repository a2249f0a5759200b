"""Coefficients of a run: diffusers' own schedulers are the oracle, and a step with them is their ``step``."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import retrieve_timesteps
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from torch import Tensor

from emag_export.contract import DenoiserContract, TensorSpec
from emag_export.engines.function import FunctionEngine
from emag_export.errors import InputError, ModelError
from emag_export.kinds import Variant
from emag_export.runtime.guidance.rules import Guidance
from emag_export.runtime.loop import DenoiseStep, DrawNoise, denoise
from emag_export.runtime.sampling.conditioning import Conditioning
from emag_export.runtime.sampling.plan import make_plan
from emag_export.runtime.sampling.schedule import (
    Schedule,
    ddim_schedule,
    ddpm_schedule,
    flow_match_schedule,
    schedule_of,
)
from emag_export.runtime.sampling.state import RunState

CONFIGS: dict[str, dict[str, Any]] = {
    "sd3": {"shift": 3.0},
    "plain": {},
    "karras": {"shift": 3.0, "use_karras_sigmas": True},
    "dynamic": {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15},
}


def flow_scheduler(config: dict[str, Any], steps: int, tokens: int) -> Any:
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    mu = None
    if config.get("use_dynamic_shifting"):
        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        mu = calculate_shift(tokens, *(scheduler.config[name] for name in names))
    scheduler.set_timesteps(steps, mu=mu)
    return scheduler


@pytest.mark.parametrize("steps", [1, 2, 28])
@pytest.mark.parametrize("name", ["sd3", "dynamic"])
def test_levels_that_a_pipeline_hands_over_are_shifted_as_diffusers_does(name: str, steps: int) -> None:
    """Bit for bit; the call is that of diffusers' Flux pipeline."""
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", **CONFIGS[name]}
    theirs = FlowMatchEulerDiscreteScheduler(**CONFIGS[name])
    mu = calculate_shift(1024) if name == "dynamic" else None
    retrieve_timesteps(theirs, steps, "cpu", sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    ours = schedule_of(config, steps, 1024, prediction="velocity", sigmas="linear")
    assert torch.equal(torch.tensor(ours.sigmas), theirs.sigmas[:-1])
    assert torch.equal(torch.tensor(ours.timesteps), theirs.timesteps.float())
    own = schedule_of(config, steps, 1024, prediction="velocity")
    assert steps == 1 or own.sigmas[-1] < ours.sigmas[-1] / 2


@pytest.mark.parametrize("steps", [1, 2, 7, 28, 50])
@pytest.mark.parametrize("name", CONFIGS)
def test_flow_matching_equals_diffusers_over_a_whole_run(name: str, steps: int) -> None:
    """Bit for bit: noise levels, times, and the latents after every step."""
    config, tokens = CONFIGS[name], 1024
    theirs = flow_scheduler(config, steps, tokens)
    ours = flow_match_schedule(config, steps, tokens)
    assert {len(ours.p), len(ours.q), len(ours.a), len(ours.b), ours.steps} == {steps}
    assert ours.log_variance is None
    assert torch.equal(torch.tensor(ours.sigmas), theirs.sigmas[:-1])
    assert torch.equal(torch.tensor(ours.timesteps), theirs.timesteps.float())
    generator = torch.Generator().manual_seed(0)
    latents = wanted = torch.randn(1, 4, 3, 3, generator=generator)
    for index, timestep in enumerate(theirs.timesteps):
        velocity = torch.randn(1, 4, 3, 3, generator=generator)
        clean = ours.p[index] * latents + ours.q[index] * velocity
        assert torch.equal(clean, latents - theirs.sigmas[index] * velocity)
        latents = ours.a[index] * latents + ours.b[index] * velocity
        wanted = theirs.step(velocity, timestep, wanted).prev_sample
        assert torch.equal(latents, wanted)


def test_every_number_of_steps_ends_at_zero() -> None:
    for steps in range(1, 51):
        schedule = flow_match_schedule(CONFIGS["sd3"], steps, 64)
        levels = [*schedule.sigmas, schedule.sigmas[-1] + schedule.b[-1]]
        assert len(levels) == steps + 1
        assert levels[-1] == 0
        assert all(high > low for high, low in pairwise(levels))


@dataclass(frozen=True, kw_only=True)
class Diffusion:
    """A scheduler of diffusers, and what makes the same of its configuration."""

    kind: Any
    make: Callable[[Mapping[str, Any], int, int], Schedule]
    steps: int
    settings: Mapping[str, Any]

    @property
    def config(self) -> dict[str, Any]:
        return {"beta_start": 1e-4, "beta_end": 0.02, "clip_sample": False, **self.settings}

    @property
    def schedule(self) -> Schedule:
        return self.make(self.config, self.steps, 0)

    @property
    def channels(self) -> int:
        """That the model predicts of four latent ones."""
        return 8 if self.settings.get("variance_type") == "learned_range" else 4

    @property
    def float32(self) -> float:
        """Bound on the error in float32, relative to the largest value.

        Diffusers loses digits of beta, which is 1 - alpha / alpha' of two numbers near 1: 1.8e-6 was measured
        at 25 and 50 steps, 1.05e-5 at the end of 250. In float64 it is exact.
        """
        return 2e-5 if self.steps == 250 else 1e-5

    def scheduler(self) -> Any:
        """Ready for a run."""
        scheduler = self.kind(**self.config)
        scheduler.set_timesteps(self.steps)
        return scheduler

    def step(
        self, scheduler: Any, output: Tensor, index: int, latents: Tensor, noise: torch.Generator
    ) -> Any:
        """Of diffusers, at the timestep of this index; DDIM adds noise only where its eta says so."""
        generator = {} if self.kind is DDIMScheduler else {"generator": noise}
        return scheduler.step(output, int(scheduler.timesteps[index]), latents, **generator)


def ddim(spacing: str) -> Any:
    settings = {"timestep_spacing": spacing}
    made = Diffusion(kind=DDIMScheduler, make=ddim_schedule, steps=50, settings=settings)
    return pytest.param(made, id=f"ddim-50-{spacing}")


def ddpm(spacing: str, steps: int, variance: str, offset: int = 0) -> Any:
    settings = {"timestep_spacing": spacing, "variance_type": variance, "steps_offset": offset}
    made = Diffusion(kind=DDPMScheduler, make=ddpm_schedule, steps=steps, settings=settings)
    return pytest.param(made, id=f"ddpm-{steps}-{spacing}-{variance}" + (f"+{offset}" if offset else ""))


SPACINGS = ("linspace", "leading")
DIFFUSIONS = [
    *(ddim(spacing) for spacing in (*SPACINGS, "trailing")),
    # Its last step begins at 1, behind which there is one more, but none in the run.
    ddpm("leading", 25, "fixed_small", offset=1),
    *(
        ddpm(spacing, steps, variance)
        for spacing in SPACINGS
        for steps in (25, 250)
        for variance in ("fixed_small", "fixed_large", "learned_range")
    ),
]


def stepped(schedule: Schedule, index: int, latents: Tensor, output: Tensor, noise: Tensor) -> Tensor:
    """x' = a x + b eps + exp((low + f (high - low)) / 2) z, f = (v + 1) / 2 of channels behind eps."""
    channels = latents.shape[1]
    after = schedule.a[index] * latents + schedule.b[index] * output[:, :channels]
    bounds = None if schedule.log_variance is None else schedule.log_variance[index]
    if bounds is None:
        return after
    learned = output.shape[1] > channels
    share = (output[:, channels:] + 1) / 2 if learned else torch.zeros_like(latents)
    return after + torch.exp((bounds[0] + share * (bounds[1] - bounds[0])) / 2) * noise


def close(got: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Relative to the largest value."""
    torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance * float(wanted.abs().max()))


@pytest.mark.parametrize("diffusion", DIFFUSIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_diffusion_equals_diffusers_in_every_step(diffusion: Diffusion, dtype: torch.dtype) -> None:
    """Next latents and clean latents, noise drawn by diffusers itself from the same seed.

    4e-16 was measured in float64.
    """
    theirs, ours = diffusion.scheduler(), diffusion.schedule
    theirs.alphas_cumprod = theirs.alphas_cumprod.to(dtype)
    tolerance = 1e-13 if dtype is torch.float64 else diffusion.float32
    assert ours.timesteps == tuple(map(float, theirs.timesteps))
    assert ours.sigmas == pytest.approx(
        torch.sqrt(1 - theirs.alphas_cumprod.double()[theirs.timesteps]).tolist()
    )
    generator, drawn, noise = (torch.Generator().manual_seed(seed) for seed in (0, 1, 1))
    for index in range(ours.steps):
        latents = torch.randn(2, 4, 5, 6, generator=generator, dtype=dtype)
        output = torch.randn(2, diffusion.channels, 5, 6, generator=generator, dtype=dtype)
        wanted = diffusion.step(theirs, output, index, latents, drawn)
        noisy = ours.log_variance is not None and ours.log_variance[index] is not None
        z = torch.randn(latents.shape, generator=noise, dtype=dtype) if noisy else torch.zeros_like(latents)
        close(stepped(ours, index, latents, output, z), wanted.prev_sample, tolerance)
        clean = ours.p[index] * latents + ours.q[index] * output[:, :4]
        close(clean, wanted.pred_original_sample, tolerance)
    assert torch.equal(drawn.get_state(), noise.get_state()), "as many numbers were drawn"


def predicted(latents: Tensor, channels: int) -> Tensor:
    """Of a model whose epsilon is most of the latents; where it learns a variance, that follows them too."""
    return torch.cat([0.9 * latents, 0.5 * latents], dim=1)[:, :channels]


def run_of(diffusion: Diffusion, start: Tensor, noise: DrawNoise | None = None) -> Iterator[DenoiseStep]:
    """A run of the loop, with that model."""
    contract = DenoiserContract(
        family="sd3",
        variant=Variant.EMAG_Q,
        blocks=(0,),
        num_blocks=1,
        heads=1,
        head_dim=1,
        latents=(4, 6, 8),
        out_channels=diffusion.channels,
        grid=(3, 4),
        keys=12,
        conditioning=(TensorSpec(name="class_labels", dtype="int64", dims=("trunk_rows",)),),
        prediction="epsilon",
    )

    def model(feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        rows = feeds["hidden_states"][feeds["branch_rows"]]
        return {"noise_pred": predicted(rows, diffusion.channels)}

    engine = FunctionEngine(contract.graph, model)
    plan = make_plan(contract, diffusion.schedule, Guidance(name="cfg", scale=1.0))
    labels = {"class_labels": torch.zeros(len(start), dtype=torch.int64)}
    given = Conditioning(given=labels, negative=labels)
    return denoise(engine, plan, RunState.start(contract, start, labels), given, noise=noise)


START = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("diffusion", DIFFUSIONS)
def test_a_run_of_the_loop_is_a_run_of_diffusers(diffusion: Diffusion) -> None:
    """In float32 and step by step on our own latents before it; bounds as above."""
    theirs = diffusion.scheduler()
    drawn, generator = (torch.Generator().manual_seed(1) for _ in range(2))
    steps = run_of(diffusion, START, lambda index: torch.randn(START.shape, generator=generator))
    for index, step in enumerate(steps):
        output = predicted(step.before, diffusion.channels)
        wanted = diffusion.step(theirs, output, index, step.before, drawn)
        close(step.latents, wanted.prev_sample, diffusion.float32)
        close(step.clean, wanted.pred_original_sample, diffusion.float32)
    assert torch.equal(drawn.get_state(), generator.get_state()), "noise is drawn where a step adds some"


def test_a_sampler_that_adds_noise_asks_for_it() -> None:
    settings = {"variance_type": "fixed_small"}
    diffusion = Diffusion(kind=DDPMScheduler, make=ddpm_schedule, steps=4, settings=settings)
    with pytest.raises(InputError, match="adds noise at every step: give `noise`"):
        next(run_of(diffusion, START))


@pytest.mark.parametrize("make", [flow_match_schedule, ddim_schedule, ddpm_schedule])
@pytest.mark.parametrize("steps", [0, -3])
def test_no_steps_are_refused(make: Callable[..., Schedule], steps: int) -> None:
    with pytest.raises(InputError, match="give at least 1"):
        make({"clip_sample": False}, steps, 64)


def test_noise_levels_that_are_none_are_refused() -> None:
    """diffusers stretches levels so that the last is 0.02; with one step it divides 0 by 0."""
    refused = pytest.raises(InputError, match="no finite noise levels for 1 steps; take more")
    with pytest.warns(RuntimeWarning, match="invalid value"), refused:
        flow_match_schedule({"shift": 3.0, "shift_terminal": 0.02}, 1, 64)
    assert flow_match_schedule({"shift": 3.0, "shift_terminal": 0.02}, 2, 64).sigmas[-1] == pytest.approx(
        0.02
    )


@pytest.mark.parametrize("make", [ddim_schedule, ddpm_schedule])
def test_more_steps_than_the_model_was_trained_on_are_refused(make: Callable[..., Schedule]) -> None:
    with pytest.raises(InputError, match=r"1001 denoising steps were asked for; .* at most 1000"):
        make({"clip_sample": False}, 1001, 64)


@pytest.mark.parametrize("make", [ddim_schedule, ddpm_schedule])
def test_as_many_steps_as_the_model_was_trained_on_are_taken(make: Callable[..., Schedule]) -> None:
    assert make({"clip_sample": False, "num_train_timesteps": 50}, 50, 64).steps == 50


EPSILON = {"clip_sample": False, "prediction_type": "epsilon"}
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"stochastic_sampling": True}, "velocity", "stochastic_sampling and invert_sigmas are not supported"),
    ({"invert_sigmas": True}, "velocity", "stochastic_sampling and invert_sigmas are not supported"),
    ({"_class_name": "UniPCMultistepScheduler"}, "epsilon", "the scheduler is UniPC.*; only FlowMatchEuler"),
    ({}, "epsilon", "predicts epsilon, its scheduler FlowMatchEulerDiscreteScheduler takes velocity"),
    *(
        ({"_class_name": kind, **EPSILON, **changed}, prediction, message)
        for kind in ("DDIMScheduler", "DDPMScheduler")
        for changed, prediction, message in (
            ({"clip_sample": True}, "epsilon", "clip_sample of the scheduler is True; only False"),
            ({"thresholding": True}, "epsilon", "thresholding of the scheduler is True; only False"),
            ({"prediction_type": "v_prediction"}, "epsilon", "is v_prediction; only epsilon is supported"),
            ({}, "velocity", f"predicts velocity, its scheduler {kind} takes epsilon"),
        )
    ),
    ({"_class_name": "DDIMScheduler"}, "epsilon", "clip_sample of the scheduler is True"),
    ({"_class_name": "DDPMScheduler", **EPSILON, "variance_type": "learned"}, "epsilon", "is learned; only"),
]


@pytest.mark.parametrize(("config", "prediction", "message"), REFUSED)
def test_schedulers_that_cannot_be_done_are_refused(
    config: dict[str, Any], prediction: str, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        schedule_of(config, 4, 64, prediction=prediction)


@pytest.mark.parametrize(
    ("config", "prediction", "make"),
    [
        ({}, "velocity", flow_match_schedule),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "velocity", flow_match_schedule),
        ({"_class_name": "DDIMScheduler", **EPSILON}, "epsilon", ddim_schedule),
        ({"_class_name": "DDPMScheduler", **EPSILON}, "epsilon", ddpm_schedule),
    ],
)
def test_the_scheduler_of_a_checkpoint_is_found_by_its_class(
    config: dict[str, Any], prediction: str, make: Callable[..., Schedule]
) -> None:
    assert schedule_of(config, 4, 64, prediction=prediction) == make(config, 4, 64)
