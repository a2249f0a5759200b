"""The denoising loop: one engine call a step, state in, state out, the caller owns the pace."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from emag_export.engines.protocol import TORCH_DTYPES, Engine
from emag_export.errors import InputError
from emag_export.runtime.guidance import Predictions, Rows, combine
from emag_export.runtime.plan import Phase, Plan, PlannedStep
from emag_export.runtime.rows import lay_out_rows
from emag_export.runtime.select import Select, lagged_argmax
from emag_export.runtime.state import EmaState

__all__ = ["Anneal", "Conditioning", "DenoiseStep", "ImageStep", "call_engine", "denoise"]


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

    def trunk(self, uncond: bool) -> tuple[Tensor, Tensor]:
        """Embeddings and pooled embeddings of the trunk rows ``[u…, c…]``."""
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
    """After the step."""


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
    layout = lay_out_rows([step.phase for step in steps], uncond)
    embeds, pooled = conditioning.trunk(uncond)
    device, copies = latents.device, 1 + uncond
    feeds: Mapping[str, Tensor] = {
        "hidden_states": latents.repeat(copies, 1, 1, 1),
        "timestep": torch.tensor([step.timestep for step in steps] * copies, device=device),
        "encoder_hidden_states": embeds,
        "pooled_projections": pooled,
        "branch_rows": torch.tensor(layout.branch_rows, device=device),
        "ema_state": state.average,
        "ema_step": torch.tensor([step.ema_step for step in steps], device=device),
        "layer_mask": mask,
    }
    dtypes = {tensor.name: TORCH_DTYPES[tensor.dtype] for tensor in engine.spec.inputs}
    outputs = engine.run(
        {name: tensor.to(dtypes[name]) for name, tensor in feeds.items()}, out={"ema_state_out": state.spare}
    )
    velocity = outputs["noise_pred"].float()
    cond = velocity[list(layout.cond)]
    predictions = Predictions(
        uncond=None if layout.uncond is None else velocity[list(layout.uncond)],
        cond=cond,
        perturbed=cond if layout.perturbed == layout.cond else velocity[list(layout.perturbed)],
    )
    return predictions, state.advanced(outputs["layer_delta"])


def denoise(
    engine: Engine,
    plan: Plan,
    latents: Rows,
    conditioning: Conditioning,
    *,
    select: Select = lagged_argmax,
    anneal: Anneal | None = None,
) -> Iterator[DenoiseStep]:
    """Denoise a batch of images, yielding after every step.

    A generator: the caller shows progress, takes previews and stops early by leaving its ``for``.

    Args:
        engine: Runs the forked graph of ``plan.contract``.
        plan: Steps and guidance.
        latents: Initial noise, one per image, on the engine's device.
        conditioning: Per image, on the engine's device.
        select: Chooses the block to perturb.
        anneal: Changes the conditioning of each step; CADS.

    Yields:
        One :class:`DenoiseStep` per step; the last one holds the finished latents.
    """
    rule, latents, momentum = plan.guidance.rule, latents.float(), None
    patch = plan.contract.patch_size
    state = EmaState.zeros(
        plan.contract,
        images=latents.shape[0],
        grid=(latents.shape[2] // patch, latents.shape[3] // patch),
        text=conditioning.embeds.shape[1],
        device=latents.device,
    )
    for step in plan.steps:
        delta, mask = state.delta, torch.zeros_like(state.delta)
        if step.phase is Phase.GUIDE:
            mask = select(step.index, state.delta) * plan.windows.strength
        predictions, state = call_engine(
            engine,
            [ImageStep.of(step)] * latents.shape[0],
            latents,
            conditioning if anneal is None else anneal(step.index, conditioning),
            state,
            mask=mask,
            uncond=rule.uncond,
        )
        if step.starts_average or step.phase is Phase.PLAIN:
            # Nothing older was averaged, or nothing is: what the graph measured then is no Delta.
            state = replace(state, delta=delta)
        velocity, momentum = combine(plan.guidance, predictions, latents, momentum, -step.sigma)
        latents = latents + step.sigma_step * velocity
        yield DenoiseStep(plan=step, latents=latents, predictions=predictions, mask=mask, state=state)
