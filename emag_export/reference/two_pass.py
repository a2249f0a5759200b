"""The released algorithm, literally: two full passes of the unmodified diffusers model per step.

This is the oracle that every engine is held against, so it has nothing in common with the forked
graph except the plan, the block choice and the guidance arithmetic. It is slow on purpose.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from emag_export.errors import InputError, ModelError
from emag_export.families import family_of
from emag_export.reference.comparison import TensorError
from emag_export.reference.direction import DirectionError
from emag_export.reference.kinds import Probe
from emag_export.reference.perturb import perturbing, probes_of
from emag_export.runtime.guidance.clean import Clean
from emag_export.runtime.guidance.rules import Predictions, Rows, Terms, combine
from emag_export.runtime.loop import Anneal, DrawNoise
from emag_export.runtime.sampling.conditioning import Conditioning
from emag_export.runtime.sampling.plan import Phase, Plan, PlannedStep
from emag_export.runtime.sampling.select import block_mask
from emag_export.runtime.sampling.state import state_shape

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
    noise: Rows | None = None
    """Standard normal; what was added is a multiple of it. None where the sampler adds none."""
    floor: Mapping[str, TensorError] = field(default_factory=dict)
    """By output, the error that PyTorch itself makes in the engine's precision on this very step; empty
    where it was not measured."""
    direction_floors: Mapping[str, DirectionError] = field(default_factory=dict)
    """By precision, what PyTorch makes of c - p in it; only in guided steps, and where it was measured."""


@dataclass(frozen=True, kw_only=True)
class _Averages:
    """E and Delta of every image and candidate block, over the conditional row only."""

    average: Float[Tensor, "images layers *state"]
    delta: Float[Tensor, "images layers"]


def two_pass_denoise(
    model: Any,
    plan: Plan,
    latents: Rows,
    conditioning: Conditioning,
    *,
    anneal: Anneal | None = None,
    noise: DrawNoise | None = None,
) -> Iterator[ReferenceStep]:
    """Denoise a batch of images with two full passes per step, yielding after every step.

    The model is watched only while a pass runs, so leaving the ``for`` early, or an error in a pass, leaves
    nothing behind.

    Args:
        model: The diffusers transformer in eval mode; its dtype is that of the passes, averages are float32.
        plan: Steps, windows, guidance; its contract names variant, renormalisation and blocks.
        latents: Initial noise, one per image, on the model's device.
        conditioning: Per image, on the model's device.
        anneal: Changes the conditioning of each step; CADS.
        noise: For samplers that add noise.

    Yields:
        Every step, a :class:`ReferenceStep`.

    Raises:
        ModelError: If the plan is for another model, or its attention cannot be watched.

    Source:
        arXiv:2512.17303, eqs. 8-14 and its released code; per image where that averages over the batch.
    """
    blocks = _oracle(plan).attention_blocks(model)
    if len(blocks) != plan.contract.num_blocks:
        raise ModelError(
            f"the model has {len(blocks)} blocks, the plan is for {plan.contract.num_blocks}; "
            "give the checkpoint that the bundle was exported from"
        )
    latents = latents.float()
    momentum = torch.zeros_like(latents)
    state = _nothing_yet(plan, latents, conditioning)
    for step in plan.steps:
        before, latents_before = state, latents
        mask = block_mask(step.choice, state.delta, step.strength)
        now = conditioning if anneal is None else anneal(step.index, conditioning)
        predictions, variance = _pass(model, plan, step, latents, now)
        if step.phase != Phase.PLAIN:
            columns = state.average.shape[-1]
            probes = probes_of(
                plan.contract, step, _kept(plan, step, state), mask, latents.shape[1:], columns
            )
            with perturbing(plan.contract, blocks, probes):
                perturbed = _pass(model, plan, step, latents, now)[0].cond
            if plan.contract.kind.averages is not None:
                state = _collected(probes, state)
            if step.phase == Phase.GUIDE:
                predictions = replace(predictions, perturbed=perturbed)
        terms = Terms.of(plan.guidance, Clean.of(step.p, step.q))
        guided, momentum = combine(step.rule, terms, predictions, latents, momentum)
        latents, drawn = step.a * latents + step.b * guided, None
        if step.log_variance is not None:
            assert noise is not None, "a plan of a sampler that adds noise comes with it"
            low, high = step.log_variance
            share = 0.0 if variance is None else (variance + 1) / 2
            drawn = noise(step.index)
            latents = latents + torch.exp(torch.as_tensor((low + share * (high - low)) / 2)) * drawn
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
            noise=drawn,
        )


def _oracle(plan: Plan) -> Any:
    return family_of(plan.contract).part("oracle")


@torch.no_grad()
def _pass(
    model: Any, plan: Plan, step: PlannedStep, latents: Rows, conditioning: Conditioning
) -> tuple[Predictions, Rows | None]:
    """One pass of the whole model over rows ``[u…, c…]``, and the variance it predicts; watched or not.

    Over ``[c…]`` alone where the step needs no unconditional prediction.
    """
    given, negative = conditioning.given, conditioning.negative
    uncond = step.rule.uncond
    if uncond:
        if negative is None:
            raise InputError("this guidance needs an unconditional prediction: give a negative conditioning")
        given = {name: torch.cat([negative[name], tensor]) for name, tensor in given.items()}
    rows = torch.cat([latents, latents]) if uncond else latents
    whole = (
        _oracle(plan)
        .predict(
            model,
            rows.to(model.dtype),
            torch.full((rows.shape[0],), step.timestep, device=rows.device),
            {name: t.to(model.dtype) if t.is_floating_point() else t for name, t in given.items()},
        )
        .float()
    )
    images, channels = latents.shape[0], latents.shape[1]
    prediction = whole[:, :channels]
    cond = prediction[-images:]
    predictions = Predictions(uncond=prediction[:images] if uncond else None, cond=cond, perturbed=cond)
    return predictions, whole[-images:, channels:] if whole.shape[1] > channels else None


def _nothing_yet(plan: Plan, latents: Rows, conditioning: Conditioning) -> _Averages:
    shape = state_shape(plan.contract, latents, conditioning.given)
    return _Averages(
        average=torch.zeros(shape, device=latents.device),
        delta=torch.zeros(shape[:2], device=latents.device),
    )


def _kept(plan: Plan, step: PlannedStep, state: _Averages) -> dict[int, Tensor]:
    """E of every candidate block by its number; nothing before the first accumulation."""
    if plan.contract.kind.averages is None or step.starts_average:
        return {}
    return {block: state.average[:, layer] for layer, block in enumerate(plan.contract.blocks)}


def _collected(probes: dict[int, Probe], before: _Averages) -> _Averages:
    averages = [probe.average for probe in probes.values()]
    assert all(probe.calls == 1 for probe in probes.values()), "a candidate block was not run, or twice"
    stacked = torch.stack([average for average in averages if average is not None], dim=1)
    return _Averages(
        average=stacked.reshape(before.average.shape),
        delta=torch.stack([probe.delta for probe in probes.values()], dim=1),
    )
