"""A weaker model as the negative: what it predicts given the prompt is what the run is steered away from."""

from dataclasses import dataclass, replace

from emag_export.contract import DenoiserContract
from emag_export.engines.protocol import Engine
from emag_export.errors import InputError
from emag_export.runtime.guidance.rules import Guidance, Rows
from emag_export.runtime.sampling.call import PlacedCall, calls_of, place_calls
from emag_export.runtime.sampling.conditioning import Conditioning
from emag_export.runtime.sampling.plan import Phase, Plan, PlannedStep
from emag_export.runtime.sampling.state import RunState
from emag_export.runtime.step import predict

__all__ = ["WeakModel", "WeakRun", "without_perturbed_rows"]

_COND_ONLY = Guidance(name="emag-only").rule


@dataclass(frozen=True, kw_only=True)
class WeakRun:
    """A weaker model beside one run."""

    engine: Engine
    calls: tuple[PlacedCall, ...]
    """One per step of the run, of conditional rows alone."""
    run: RunState
    """Only its buffers are used: a graph with averages wants some, and holds them as they are."""

    def predict(self, index: int, latents: Rows, conditioning: Conditioning) -> Rows:
        """Its prediction given the prompt.

        Args:
            index: Of the step.
            latents: x of the step, one per image.
            conditioning: Of the step.
        """
        call, run = self.calls[index], replace(self.run, latents=latents)
        predictions, _ = predict(self.engine, call, run, conditioning.trunk(call.rows))
        return predictions.cond


@dataclass(frozen=True, kw_only=True)
class WeakModel:
    """A second engine; neither its averages nor its candidate blocks are used.

    Source:
        AutoGuidance, arXiv:2406.02507, eq. 3: a smaller or less trained model of the same task.
    """

    engine: Engine
    contract: DenoiserContract
    """Of its graph."""

    def start(self, plan: Plan, latents: Rows, conditioning: Conditioning) -> WeakRun:
        """What it needs for a run; everything that is known before is on the device afterwards.

        Args:
            plan: Of the model that is guided.
            latents: Initial noise, one per image.
            conditioning: Of the images; only its shapes are looked at.

        Raises:
            InputError: If the two models do not predict the same thing from the same inputs.
        """
        for name in ("family", "latents", "prediction", "conditioning"):
            if getattr(self.contract, name) != getattr(plan.contract, name):
                raise InputError(
                    f"the weak model's {name} differs from that of the model it shall guide; "
                    "give a bundle of the same family, precision and text encoders"
                )
        own = without_perturbed_rows(plan)
        own = replace(own, steps=tuple(replace(step, rule=_COND_ONLY) for step in own.steps))
        return WeakRun(
            engine=self.engine,
            calls=place_calls(calls_of(own, latents.shape[0]), self.contract, latents.device),
            run=RunState.start(self.contract, latents, conditioning.given),
        )


def without_perturbed_rows(plan: Plan) -> Plan:
    """The plan of the model that is guided: no row of it is perturbed, and nothing is averaged."""
    return replace(plan, steps=tuple(_plain(step) for step in plan.steps))


def _plain(step: PlannedStep) -> PlannedStep:
    return replace(step, phase=Phase.PLAIN, ema_step=0.0, starts_average=False, strength=0.0, choice=None)
