"""The denoising loop: one engine call a step, state in, state out, the caller owns the pace."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from emag_export.engines.protocol import TORCH_DTYPES, Engine
from emag_export.errors import InputError
from emag_export.runtime.device import to_device
from emag_export.runtime.guidance.rules import Predictions, Rows, combine
from emag_export.runtime.sampling.plan import Phase, Plan, PlannedStep
from emag_export.runtime.sampling.rows import PlacedRows, place_rows
from emag_export.runtime.sampling.select import Select, lagged_argmax
from emag_export.runtime.sampling.state import EmaState

__all__ = [
    "Anneal",
    "Conditioning",
    "DenoiseStep",
    "ImageStep",
    "PlacedCall",
    "Trunk",
    "call_engine",
    "denoise",
    "place_calls",
    "run_call",
]

Trunk = tuple[Float[Tensor, "trunk_rows text text_dim"], Float[Tensor, "trunk_rows pooled_dim"]]
"""Embeddings and pooled embeddings of the trunk rows ``[u…, c…]``."""


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """What the prompts became, one row per image."""

    embeds: Float[Tensor, "images text text_dim"]
    pooled: Float[Tensor, "images pooled_dim"]
    negative_embeds: Float[Tensor, "images text text_dim"] | None = None
    negative_pooled: Float[Tensor, "images pooled_dim"] | None = None

    def __post_init__(self) -> None:
        if (self.negative_embeds is None) != (self.negative_pooled is None):
            raise InputError("negative_embeds and negative_pooled come together: give both or neither")

    def to(self, device: torch.device) -> "Conditioning":
        """The same on another device."""
        negative, pooled = self.negative_embeds, self.negative_pooled
        return Conditioning(
            embeds=self.embeds.to(device),
            pooled=self.pooled.to(device),
            negative_embeds=None if negative is None else negative.to(device),
            negative_pooled=None if pooled is None else pooled.to(device),
        )

    def trunk(self, uncond: bool) -> Trunk:
        """What the trunk rows take.

        Raises:
            InputError: If unconditional rows are asked for and there is no negative prompt.
        """
        if not uncond:
            return self.embeds, self.pooled
        if self.negative_embeds is None or self.negative_pooled is None:
            raise InputError("this guidance needs an unconditional prediction: give negative embeddings")
        return torch.cat([self.negative_embeds, self.embeds]), torch.cat([self.negative_pooled, self.pooled])


Anneal = Callable[[int, Conditioning], Conditioning]
"""(step index, conditioning of the run) to the conditioning of that step."""


@dataclass(frozen=True, kw_only=True)
class ImageStep:
    """What one call does for one image: images of a call may be at different steps."""

    phase: Phase
    timestep: float
    ema_step: float

    @classmethod
    def of(cls, step: PlannedStep) -> "ImageStep":
        """The call of a planned step."""
        return cls(phase=step.phase, timestep=step.timestep, ema_step=step.ema_step)


@dataclass(frozen=True, kw_only=True)
class DenoiseStep:
    """One finished step."""

    plan: PlannedStep
    latents: Rows
    """After the step, float32; the next step reads but never changes them."""
    predictions: Predictions
    mask: Float[Tensor, "images layers"]
    """Which candidate block was perturbed; zeros outside the perturb window."""
    state: EmaState
    """After the step. Its two buffers take turns: the next step but one overwrites them, and a lent state
    is zeroed for its next run. What is needed for longer must be cloned before the next step."""


@dataclass(frozen=True, kw_only=True)
class PlacedCall:
    """What one call does, on the device, so that nothing has to be copied there when its turn comes."""

    rows: PlacedRows
    timestep: Float[Tensor, " trunk_rows"]
    """1000 sigma."""
    ema_step: Float[Tensor, " images"]


def place_calls(
    calls: Sequence[Sequence[ImageStep]], *, uncond: bool, device: torch.device
) -> tuple[PlacedCall, ...]:
    """Put calls on a device, all of them in two copies.

    Args:
        calls: What each call does, one :class:`ImageStep` per image; all for the same number of images.
        uncond: Whether unconditional predictions are needed.
        device: Where the engine runs.
    """
    copies = 1 + uncond
    timesteps = torch.tensor([[step.timestep for step in steps] * copies for steps in calls])
    ema_steps = torch.tensor([[step.ema_step for step in steps] for steps in calls])
    return tuple(
        PlacedCall(
            rows=place_rows(tuple(step.phase for step in steps), uncond, device),
            timestep=timestep,
            ema_step=ema_step,
        )
        for steps, timestep, ema_step in zip(
            calls, to_device(timesteps, device), to_device(ema_steps, device), strict=True
        )
    )


def run_call(
    engine: Engine,
    call: PlacedCall,
    latents: Rows,
    trunk: Trunk,
    state: EmaState,
    mask: Float[Tensor, "images layers"],
) -> tuple[Predictions, EmaState]:
    """One engine call; the host does not wait for it where the engine does not.

    Args:
        engine: Runs the forked graph.
        call: What it does, placed on the engine's device.
        latents: x per image.
        trunk: Conditioning of the trunk rows.
        state: Per image; its spare buffer is overwritten.
        mask: lambda per image and candidate block; only rows that are perturbed may be non-zero.

    Returns:
        Float32 predictions, and the state after the call.
    """
    embeds, pooled = trunk
    feeds: Mapping[str, Tensor] = {
        "hidden_states": latents.repeat(call.timestep.shape[0] // latents.shape[0], 1, 1, 1),
        "timestep": call.timestep,
        "encoder_hidden_states": embeds,
        "pooled_projections": pooled,
        "branch_rows": call.rows.branch_rows,
        "ema_state": state.average,
        "ema_step": call.ema_step,
        "layer_mask": mask,
    }
    dtypes = {tensor.name: TORCH_DTYPES[tensor.dtype] for tensor in engine.spec.inputs}
    outputs = engine.run(
        {name: tensor.to(dtypes[name]) for name, tensor in feeds.items()}, out={"ema_state_out": state.spare}
    )
    uncond, cond, perturbed = call.rows.split(outputs["noise_pred"].float())
    predictions = Predictions(uncond=uncond, cond=cond, perturbed=perturbed)
    return predictions, state.advanced(outputs["layer_delta"])


def call_engine(
    engine: Engine,
    steps: Sequence[ImageStep],
    latents: Rows,
    conditioning: Conditioning,
    state: EmaState,
    *,
    mask: Float[Tensor, "images layers"],
    uncond: bool,
) -> tuple[Predictions, EmaState]:
    """One engine call for images that may be in different phases and at different steps.

    :func:`run_call` with everything placed on the spot; a loop that knows its steps places them before.

    Args:
        engine: Runs the forked graph.
        steps: One per image.
        latents: x per image.
        conditioning: Per image.
        state: Per image; its spare buffer is overwritten.
        mask: lambda per image and candidate block; only rows that are perturbed may be non-zero.
        uncond: Whether an unconditional prediction is needed.

    Returns:
        Float32 predictions, and the state after the call.
    """
    (call,) = place_calls([steps], uncond=uncond, device=latents.device)
    return run_call(engine, call, latents, conditioning.trunk(uncond), state, mask)


def denoise(
    engine: Engine,
    plan: Plan,
    latents: Rows,
    conditioning: Conditioning,
    *,
    select: Select = lagged_argmax,
    anneal: Anneal | None = None,
    state: EmaState | None = None,
) -> Iterator[DenoiseStep]:
    """Denoise a batch of images, yielding after every step.

    A generator: the caller shows progress, takes previews and stops early by leaving its ``for``.
    Everything that is known before the run is on the device before the first step, and no step makes the
    host wait for the device: the block to perturb is chosen there.

    Args:
        engine: Runs the forked graph of ``plan.contract``.
        plan: Steps and guidance.
        latents: Initial noise, one per image, on the engine's device.
        conditioning: Per image, on the engine's device.
        select: Chooses the block to perturb.
        anneal: Changes the conditioning of each step; CADS.
        state: To start from, usually lent by a ``StatePool``; both its buffers are overwritten. None starts
            from new zeros.

    Yields:
        One :class:`DenoiseStep` per step; the last one holds the finished latents.
    """
    rule, latents, momentum = plan.guidance.rule, latents.float(), None
    if state is None:
        state = EmaState.zeros_for(plan.contract, latents, conditioning.embeds)
    calls = place_calls(
        [[ImageStep.of(step)] * latents.shape[0] for step in plan.steps],
        uncond=rule.uncond,
        device=latents.device,
    )
    trunk_of, trunk = conditioning, conditioning.trunk(rule.uncond)
    for step, call in zip(plan.steps, calls, strict=True):
        delta, mask = state.delta, torch.zeros_like(state.delta)
        if step.phase == Phase.GUIDE:
            mask = select(step.index, state.delta) * plan.windows.strength
        given = conditioning if anneal is None else anneal(step.index, conditioning)
        if given is not trunk_of:
            trunk_of, trunk = given, given.trunk(rule.uncond)
        predictions, state = run_call(engine, call, latents, trunk, state, mask)
        if step.starts_average or step.phase == Phase.PLAIN:
            # Nothing older was averaged, or nothing is: what the graph measured then is no Delta.
            state = replace(state, delta=delta)
        velocity, momentum = combine(plan.guidance, predictions, latents, momentum, -step.sigma)
        latents = latents + step.sigma_step * velocity
        yield DenoiseStep(plan=step, latents=latents, predictions=predictions, mask=mask, state=state)
