"""The released algorithm, literally: two full passes of the unmodified diffusers model per step.

This is the oracle that every engine is held against, so it has nothing in common with the forked
graph except the plan, the block choice and the guidance arithmetic. It is slow on purpose.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from jaxtyping import Float
from torch import Tensor

from emag_export.errors import ModelError
from emag_export.reference.comparison import TensorError
from emag_export.reference.perturb import PerturbingProcessor, installed
from emag_export.runtime.guidance.rules import Predictions, Rows, combine
from emag_export.runtime.loop import Anneal, Conditioning
from emag_export.runtime.sampling.plan import Phase, Plan, PlannedStep
from emag_export.runtime.sampling.select import Select, lagged_argmax
from emag_export.shapes import evaluate

__all__ = ["ReferenceStep", "two_pass_denoise"]


@dataclass(frozen=True, kw_only=True)
class ReferenceStep:
    """One finished step of the reference: all that went into it and all that came out."""

    plan: PlannedStep
    latents_before: Rows
    conditioning: Conditioning
    """As used at this step, after annealing."""
    average_before: Float[Tensor, "images layers *state"]
    """E in the layout of the contract, float32; zeros before the first accumulation."""
    average: Float[Tensor, "images layers *state"]
    delta_before: Float[Tensor, "images layers"]
    """What the block of this step was chosen from."""
    delta: Float[Tensor, "images layers"]
    mask: Float[Tensor, "images layers"]
    """lambda where a block was perturbed, else 0."""
    predictions: Predictions
    latents: Rows
    """After the step."""
    floor: Mapping[str, TensorError] = field(default_factory=dict)
    """By output, the error that PyTorch itself makes in the engine's precision on this very step; empty
    where it was not measured."""


@dataclass(frozen=True, kw_only=True)
class _Averages:
    """E and Delta of every image and candidate block, over the conditional row only."""

    average: Float[Tensor, "images layers *state"]
    delta: Float[Tensor, "images layers"]


def two_pass_denoise(
    model: SD3Transformer2DModel,
    plan: Plan,
    latents: Rows,
    conditioning: Conditioning,
    *,
    select: Select = lagged_argmax,
    anneal: Anneal | None = None,
) -> Iterator[ReferenceStep]:
    """Denoise a batch of images with two full passes per step, yielding after every step.

    The model carries its own attention processors whenever the caller has control, so leaving the
    ``for`` early, or an error in a pass, leaves nothing behind.

    Args:
        model: SD3 or SD3.5 in eval mode; its dtype is the dtype of the passes, averages are float32.
        plan: Steps, windows, guidance; its contract names variant, renormalisation and blocks.
        latents: Initial noise, one per image, on the model's device.
        conditioning: Per image, on the model's device.
        select: Chooses the block to perturb from the previous step's Delta.
        anneal: Changes the conditioning of each step; CADS.

    Yields:
        One :class:`ReferenceStep` per step.

    Raises:
        ModelError: If the plan is for another model.

    Source:
        arXiv:2512.17303, eqs. 8-14 and its released code; per image where that averages over the batch.
    """
    if model.config.num_layers != plan.contract.num_blocks:
        raise ModelError(
            f"the model has {model.config.num_layers} blocks, the plan is for {plan.contract.num_blocks}; "
            "give the checkpoint that the bundle was exported from"
        )
    uncond = plan.guidance.rule.uncond
    latents, momentum = latents.float(), None
    state = _nothing_yet(plan, latents, conditioning)
    for step in plan.steps:
        before, latents_before = state, latents
        mask = torch.zeros_like(state.delta)
        if step.phase == Phase.GUIDE:
            mask = select(step.index, state.delta) * plan.windows.strength
        now = conditioning if anneal is None else anneal(step.index, conditioning)
        predictions = _plain_pass(model, step, latents, now, uncond)
        if step.phase != Phase.PLAIN:
            processors = _processors(plan, step, state, mask)
            with installed(model, processors):
                perturbed = _plain_pass(model, step, latents, now, uncond).cond
            state = _collected(processors, state)
            if step.phase == Phase.GUIDE:
                predictions = replace(predictions, perturbed=perturbed)
        velocity, momentum = combine(plan.guidance, predictions, latents, momentum, -step.sigma)
        latents = latents + step.sigma_step * velocity
        yield ReferenceStep(
            plan=step,
            latents_before=latents_before,
            conditioning=now,
            average_before=before.average,
            average=state.average,
            delta_before=before.delta,
            delta=state.delta,
            mask=mask,
            predictions=predictions,
            latents=latents,
        )


@torch.no_grad()
def _plain_pass(
    model: SD3Transformer2DModel, step: PlannedStep, latents: Rows, conditioning: Conditioning, uncond: bool
) -> Predictions:
    """One pass of the whole model over rows ``[u…, c…]``; what it does is up to the processors in place."""
    embeds, pooled = conditioning.trunk(uncond)
    rows = torch.cat([latents, latents]) if uncond else latents
    velocity = model(
        hidden_states=rows.to(model.dtype),
        timestep=torch.full((rows.shape[0],), step.timestep, device=rows.device),
        encoder_hidden_states=embeds.to(model.dtype),
        pooled_projections=pooled.to(model.dtype),
        return_dict=False,
    )[0].float()
    images = latents.shape[0]
    cond = velocity[-images:]
    return Predictions(uncond=velocity[:images] if uncond else None, cond=cond, perturbed=cond)


def _nothing_yet(plan: Plan, latents: Rows, conditioning: Conditioning) -> _Averages:
    contract = plan.contract
    images, _, height, width = latents.shape
    sizes = {
        "h": height // contract.patch_size,
        "w": width // contract.patch_size,
        "text": conditioning.embeds.shape[1],
    }
    shape = (images, len(contract.blocks), *evaluate(contract.state_dims, sizes))
    return _Averages(
        average=torch.zeros(shape, device=latents.device),
        delta=torch.zeros(shape[:2], device=latents.device),
    )


def _processors(
    plan: Plan, step: PlannedStep, state: _Averages, mask: Tensor
) -> dict[int, PerturbingProcessor]:
    return {
        block: PerturbingProcessor(
            variant=plan.contract.variant,
            renorm=plan.contract.renorm,
            average=None if step.starts_average else state.average[:, layer],
            step=step.ema_step,
            strength=mask[:, layer],
        )
        for layer, block in enumerate(plan.contract.blocks)
    }


def _collected(processors: dict[int, PerturbingProcessor], before: _Averages) -> _Averages:
    averages = [processor.average for processor in processors.values()]
    assert all(average is not None for average in averages), "a candidate block was not run"
    stacked = torch.stack([average for average in averages if average is not None], dim=1)
    return _Averages(
        average=stacked.reshape(before.average.shape),
        delta=torch.stack([processor.delta for processor in processors.values()], dim=1),
    )
