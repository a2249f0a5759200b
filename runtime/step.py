"""One denoising step, as a function: mask, engine call, Delta, guidance, and the sampler's update.

Images of one call may be at different steps of different runs, in different phases, with different guidance,
some with an unconditional row and some without. An image gets the same latents alone and in company, up to
the rounding of larger matrix products. The host never waits for the device.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from emag_export.contract import BLUR_INPUTS, STATE_PAIRS
from emag_export.engines.protocol import TORCH_DTYPES, Engine
from emag_export.errors import InputError
from emag_export.runtime.guidance.blur import blur_matrix
from emag_export.runtime.guidance.rules import Predictions, Rows, combine
from emag_export.runtime.sampling.call import PlacedCall
from emag_export.runtime.sampling.conditioning import Trunk
from emag_export.runtime.sampling.select import lagged_argmax
from emag_export.runtime.sampling.state import RunState
from emag_export.shapes import evaluate, solve

__all__ = ["StepResult", "predict", "step"]


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step found on its way."""

    predictions: Predictions
    guided: Rows
    """The prediction that was stepped along."""
    mask: Float[Tensor, "images layers"]
    """lambda of every candidate block; zeros outside the perturb window."""


def step(
    engine: Engine,
    call: PlacedCall,
    run: RunState,
    trunk: Trunk,
    *,
    noise: Rows | None = None,
    perturbed: Rows | None = None,
) -> tuple[RunState, StepResult]:
    """Take every image of a call one step further.

    Args:
        engine: Runs the forked graph.
        call: What is done for each image, placed on the engine's device.
        run: State of the images; its spare buffer is overwritten.
        trunk: Conditioning of the trunk rows, ``Conditioning.trunk(call.rows)``.
        noise: Standard normal, like the latents, where a sampler adds noise.
        perturbed: The negative, where it comes from elsewhere: a weaker model's prediction.

    Returns:
        The state after the step, and what was found.

    Raises:
        InputError: If a sampler adds noise and none is given.
        ContractError: If a tensor does not fit the graph.
        EngineError: If the engine fails.

    Examples:
        >>> from emag_export import Pipeline
        >>> from emag_export.runtime.request import default_request
        >>> from emag_export.runtime.sampling.call import calls_of, place_calls
        >>> from emag_export.runtime.sampling.state import RunState
        >>> from emag_export.runtime.step import step
        >>> with Pipeline.open("bundle") as pipeline:
        ...     prepared = pipeline.prepare([default_request(pipeline.bundle, "a small yellow ring")])
        ...     plan, text, x = prepared.plan, prepared.conditioning, prepared.latents
        ...     calls = place_calls(calls_of(plan, images=1), plan.contract, x.device)
        ...     run = RunState.start(plan.contract, x, text.given)
        ...     after, found = step(pipeline.denoiser, calls[0], run, text.trunk(calls[0].rows))
        >>> tuple(after.latents.shape), tuple(after.average.shape), tuple(found.mask.shape)
        ((1, 8, 16, 16), (1, 3, 3, 8, 8, 32), (1, 3))

    Source:
        arXiv:2512.17303, eqs. 8-14; samplers in :mod:`emag_export.runtime.sampling.schedule`.
    """
    mask = _mask(call, run.delta)
    predictions, outputs = predict(engine, call, run, trunk, mask)
    if perturbed is not None:
        predictions = replace(predictions, perturbed=perturbed)
    guided, momentum = _guide(call, predictions, run)
    latents = call.a * run.latents + call.b * guided
    if call.noise is not None:
        latents = latents + _added(call, _variance(call, run, outputs), noise)
    after = RunState(
        latents=latents,
        average=run.spare,
        spare=run.average,
        delta=_delta(call, run.delta, outputs.get("layer_delta")),
        momentum=momentum,
    )
    return after, StepResult(predictions=predictions, guided=guided, mask=mask)


def predict(
    engine: Engine, call: PlacedCall, run: RunState, trunk: Trunk, mask: Tensor | None = None
) -> tuple[Predictions, dict[str, Tensor]]:
    """What the model predicts for every image of a call, before anything is done with it.

    Args:
        engine: Runs the forked graph.
        call: What is done for each image.
        run: State of the images; its spare buffer is overwritten.
        trunk: Conditioning of the trunk rows.
        mask: lambda of every candidate block per image; None perturbs nothing.

    Returns:
        The predictions, and all outputs of the graph.

    Examples:
        >>> from emag_export import Pipeline
        >>> from emag_export.runtime.request import default_request
        >>> from emag_export.runtime.sampling.call import calls_of, place_calls
        >>> from emag_export.runtime.sampling.state import RunState
        >>> from emag_export.runtime.step import predict
        >>> with Pipeline.open("bundle") as pipeline:
        ...     prepared = pipeline.prepare([default_request(pipeline.bundle, "a small yellow ring")])
        ...     plan, text, x = prepared.plan, prepared.conditioning, prepared.latents
        ...     calls = place_calls(calls_of(plan, images=1), plan.contract, x.device)
        ...     run = RunState.start(plan.contract, x, text.given)
        ...     predictions, outputs = predict(pipeline.denoiser, calls[0], run, text.trunk(calls[0].rows))
        >>> tuple(predictions.cond.shape), sorted(outputs)
        ((1, 8, 16, 16), ['ema_state_out', 'layer_delta', 'noise_pred'])
    """
    outputs = _call(engine, call, run, trunk, torch.zeros_like(run.delta) if mask is None else mask)
    channels = run.latents.shape[1]
    return call.rows.split(outputs["noise_pred"].float()[:, :channels]), outputs


def _variance(call: PlacedCall, run: RunState, outputs: dict[str, Tensor]) -> Rows | None:
    """What the model says of the variance, behind its prediction; None if it says nothing."""
    whole, channels = outputs["noise_pred"].float(), run.latents.shape[1]
    return call.rows.split(whole[:, channels:]).cond if whole.shape[1] > channels else None


def _mask(call: PlacedCall, delta: Float[Tensor, "images layers"]) -> Float[Tensor, "images layers"]:
    """Lambda of every candidate block: what was chosen before the run, or the lagged argmax of Delta."""
    if not call.guides:
        return torch.zeros_like(delta)
    if call.by_delta is None:
        return call.chosen
    return call.by_delta * lagged_argmax(delta) + call.chosen


def _call(engine: Engine, call: PlacedCall, run: RunState, trunk: Trunk, mask: Tensor) -> dict[str, Tensor]:
    names = {tensor.name for tensor in engine.spec.inputs}
    feeds: dict[str, Tensor] = {
        "hidden_states": run.latents.index_select(0, call.rows.trunk_images),
        "timestep": call.timestep,
        **trunk,
        "branch_rows": call.rows.branch_rows,
        "layer_mask": mask,
    }
    averages = names.issuperset(STATE_PAIRS)
    if averages:
        feeds |= {"ema_state": run.average, "ema_step": call.ema_step}
    if names.issuperset(BLUR_INPUTS):
        feeds |= _blurs(engine, call, run)
    dtypes = {tensor.name: TORCH_DTYPES[tensor.dtype] for tensor in engine.spec.inputs}
    typed = {name: tensor.to(dtypes.get(name, tensor.dtype)) for name, tensor in feeds.items()}
    return engine.run(typed, out={"ema_state_out": run.spare} if averages else None)


def _blurs(engine: Engine, call: PlacedCall, run: RunState) -> dict[str, Tensor]:
    """A matrix per side and image, for the sizes of this call."""
    latents = next(tensor for tensor in engine.spec.inputs if tensor.name == "hidden_states")
    shape = (call.rows.trunk_images.shape[0], *run.latents.shape[1:])
    sizes = solve({"hidden_states": latents.dims}, {"hidden_states": shape})
    found = {}
    for tensor in engine.spec.inputs:
        if tensor.name in BLUR_INPUTS:
            (side,) = evaluate(tensor.dims[-1:], sizes)
            matrices = [blur_matrix(side, sigma, run.latents.device) for sigma in call.blur_sigmas]
            found[tensor.name] = torch.stack(matrices)
    return found


def _delta(call: PlacedCall, before: Tensor, measured: Tensor | None) -> Tensor:
    if measured is None:
        return before
    if isinstance(call.measures, bool):
        return measured if call.measures else before
    return torch.where(call.measures > 0, measured, before)


def _guide(call: PlacedCall, predictions: Predictions, run: RunState) -> tuple[Rows, Rows]:
    """The prediction to step along and the momentum, rule by rule."""
    guided, momentum = predictions.cond, run.momentum
    for group in call.groups:
        if group.images is None:
            return combine(group.rule, group.terms, predictions, run.latents, run.momentum)
        part, moved = combine(
            group.rule,
            group.terms,
            predictions.select(group.images),
            run.latents.index_select(0, group.images),
            run.momentum.index_select(0, group.images),
        )
        guided = guided.index_copy(0, group.images, part)
        momentum = momentum.index_copy(0, group.images, moved)
    return guided, momentum


def _added(call: PlacedCall, variance: Rows | None, noise: Rows | None) -> Rows:
    """Noise with the variance that the sampler or the model says."""
    if call.noise is None or noise is None:
        raise InputError(
            "this sampler adds noise at every step: give `noise`, standard normal like the latents"
        )
    share = 0.0 if variance is None else (variance + 1) / 2
    spread = call.noise.low + share * (call.noise.high - call.noise.low)
    return call.noise.weight * torch.exp(spread / 2) * noise
