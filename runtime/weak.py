"""A weaker model as the negative: what it predicts given the prompt is what the run is steered away from."""

from dataclasses import dataclass, field, replace

from emag_export.contract import DenoiserContract
from emag_export.engines.protocol import Engine
from emag_export.errors import InputError
from emag_export.runtime.guidance.rules import Guidance, Rows
from emag_export.runtime.sampling.call import ImageStep, place_calls
from emag_export.runtime.sampling.conditioning import Conditioning
from emag_export.runtime.sampling.plan import Phase, Plan, PlannedStep
from emag_export.runtime.sampling.state import RunState
from emag_export.runtime.step import predict

__all__ = ["WeakModel", "without_perturbed_rows"]

_COND_ONLY = Guidance(name="emag-only")


@dataclass(frozen=True, kw_only=True)
class WeakModel:
    """A second engine; neither its averages nor its candidate blocks are used.

    Source:
        AutoGuidance, arXiv:2406.02507, eq. 3: a smaller or less trained model of the same task.
    """

    engine: Engine
    contract: DenoiserContract
    """Of its graph."""
    _state: list[RunState] = field(default_factory=list, repr=False)

    def require_fit(self, contract: DenoiserContract) -> None:
        """Refuse a model whose predictions are not of the same thing.

        Args:
            contract: Of the model that is guided.

        Raises:
            InputError: If latents, conditioning or the kind of prediction differ.
        """
        for name in ("family", "latents", "prediction", "conditioning"):
            mine, theirs = getattr(self.contract, name), getattr(contract, name)
            if mine != theirs:
                raise InputError(
                    f"the weak model's {name} differs from that of the model it shall guide; "
                    "give a bundle of the same family, precision and text encoders"
                )

    def predict(self, step: PlannedStep, latents: Rows, conditioning: Conditioning) -> Rows:
        """Its prediction given the prompt.

        Args:
            step: Of the run; only its time is looked at.
            latents: x of the step, one per image.
            conditioning: Of the step.
        """
        plain = replace(_plain(step), rule=_COND_ONLY.rule_at(0, 1))
        steps = [ImageStep(step=plain, guidance=_COND_ONLY)] * latents.shape[0]
        (call,) = place_calls([steps], self.contract, latents.device)
        if not self._state or self._state[0].latents.shape != latents.shape:
            self._state[:] = [RunState.start(self.contract, latents, conditioning.given)]
        run = replace(self._state[0], latents=latents)
        predictions, _ = predict(self.engine, call, run, conditioning.trunk(call.rows))
        return predictions.cond


def without_perturbed_rows(plan: Plan) -> Plan:
    """The plan of the model that is guided: no row of it is perturbed, and nothing is averaged."""
    return replace(plan, steps=tuple(_plain(step) for step in plan.steps))


def _plain(step: PlannedStep) -> PlannedStep:
    return replace(step, phase=Phase.PLAIN, ema_step=0.0, starts_average=False, strength=0.0)
