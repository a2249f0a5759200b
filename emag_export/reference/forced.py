"""One step on the reference's state: what an engine makes of exactly what the reference was given."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from emag_export.engines.protocol import TORCH_DTYPES, Engine
from emag_export.reference.comparison import TensorError
from emag_export.reference.direction import DirectionError, direction_error
from emag_export.reference.two_pass import ReferenceStep
from emag_export.runtime.guidance.rules import Predictions
from emag_export.runtime.sampling.call import ImageStep, place_calls
from emag_export.runtime.sampling.plan import Phase, Plan
from emag_export.runtime.sampling.state import RunState
from emag_export.runtime.step import step as take_step

__all__ = ["ForcedStep", "force_step", "with_floor"]


@dataclass(frozen=True, kw_only=True)
class ForcedStep:
    """A teacher-forced step: every error is this step's own, none was inherited."""

    errors: Mapping[str, TensorError]
    """By output: ``uncond``, ``cond``; ``perturbed`` while guiding; ``ema_state``, ``delta`` unless plain."""
    delta: Float[Tensor, "images layers"]
    """Of the engine, on the reference's device."""
    direction: DirectionError | None
    """What became of c - p; None where the step does not guide."""


def force_step(engine: Engine, plan: Plan, step: ReferenceStep) -> ForcedStep:
    """Run one step with the reference's latents, averages, conditioning and block choice.

    Args:
        engine: Runs the forked graph of ``plan.contract``; may be on another device than the reference.
        plan: The one the reference follows.
        step: Of the reference; it is not changed.
    """
    here, average = step.latents.device, step.average_before
    choices = [tuple(row) for row in step.mask.tolist()]
    planned = [replace(step.plan, choice=choice, strength=1.0) for choice in choices]
    (call,) = place_calls(
        [[ImageStep(step=own, guidance=plan.guidance) for own in planned]], plan.contract, engine.device
    )
    average = average.to(engine.device, TORCH_DTYPES[plan.contract.state_dtype], copy=True)
    latents = step.latents_before.to(engine.device)
    run = RunState(
        latents=latents,
        average=average,
        spare=torch.zeros_like(average),
        delta=torch.zeros_like(step.delta_before, device=engine.device),
        momentum=torch.zeros_like(latents),
    )
    noise = None if call.noise is None else torch.zeros_like(latents)
    trunk = step.conditioning.to(engine.device).trunk(call.rows)
    after, result = take_step(engine, call, run, trunk, noise=noise)
    delta = after.delta.to(here)
    return ForcedStep(
        errors=_errors(step, result.predictions, after.average, delta),
        delta=delta,
        direction=_direction(step, result.predictions),
    )


def with_floor(
    steps: Iterable[ReferenceStep], plan: Plan, open_floor: Callable[[], Engine], *, judges: bool = True
) -> Iterator[ReferenceStep]:
    """The same steps, each with the errors that PyTorch itself makes in it in half precision.

    Args:
        steps: Of the float32 reference.
        plan: The one the reference follows; its contract is in the precision of the floor.
        open_floor: Opens the module that was exported, in the precision of the graph; called before the
            first step, and closed after the last.
        judges: Whether engines are held against its errors; else only what becomes of c - p is kept, for
            people.
    """
    with open_floor() as engine:
        for step in steps:
            forced = force_step(engine, plan, step)
            floors = dict(step.direction_floors)
            if forced.direction is not None:
                floors[plan.contract.precision] = forced.direction
            yield replace(step, floor=forced.errors if judges else step.floor, direction_floors=floors)


def _direction(step: ReferenceStep, predictions: Predictions) -> DirectionError | None:
    wanted = step.predictions
    if step.plan.phase != Phase.GUIDE:
        return None
    return direction_error((wanted.cond, wanted.perturbed), (predictions.cond, predictions.perturbed))


def _errors(
    step: ReferenceStep, predictions: Predictions, average: Tensor, delta: Tensor
) -> dict[str, TensorError]:
    """Only what this phase makes the engine answer for."""
    wanted = step.predictions
    errors = {}
    if wanted.uncond is not None and predictions.uncond is not None:
        errors["uncond"] = _error(wanted.uncond, predictions.uncond)
    errors["cond"] = _error(wanted.cond, predictions.cond)
    if step.plan.phase == Phase.GUIDE:
        errors["perturbed"] = _error(wanted.perturbed, predictions.perturbed)
    if step.plan.phase != Phase.PLAIN and average.numel():
        errors["ema_state"] = _error(step.average, average)
        errors["delta"] = _error(step.delta, delta)
    return errors


def _error(reference: Tensor, engine: Tensor) -> TensorError:
    wanted = reference.float().flatten()
    got = engine.to(reference.device).float().flatten()
    error, largest = float((got - wanted).abs().max()), float(wanted.abs().max())
    norms = float(got.norm()) * float(wanted.norm())
    if error == 0:
        return TensorError(max_abs=0.0, relative=0.0, cosine=1.0)
    return TensorError(
        max_abs=error,
        relative=error / largest if largest else float("inf"),
        cosine=float(got @ wanted) / norms if norms else 0.0,
    )
