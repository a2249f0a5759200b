"""One run of a pipeline: perturbed passes of its model, and the averages that they move."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from emag_export.diffusers_guidance.negative import Negative
from emag_export.errors import ModelError
from emag_export.families import family_of
from emag_export.reference.perturb import perturbing, probes_of
from emag_export.runtime.sampling.plan import Phase
from emag_export.runtime.sampling.select import block_mask

__all__ = ["Call", "Run"]


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of a model, which can be repeated for some of its rows."""

    model: Any
    bound: inspect.BoundArguments

    @classmethod
    def of(cls, model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Self:
        """The call of a model with these arguments."""
        return cls(model=model, bound=inspect.signature(model.forward).bind(*args, **kwargs))

    @property
    def inputs(self) -> dict[str, Any]:
        """By name in the model's ``forward``."""
        return self.bound.arguments

    @property
    def rows(self) -> int:
        """Rows of the batch, with and without the prompt."""
        return int(self.inputs["hidden_states"].shape[0])

    def again(self, rows: slice) -> Tensor:
        """What the model predicts of some rows; hooks on the model itself are passed by."""
        some = {name: _selected(value, rows, self.rows) for name, value in self.inputs.items()}
        bound = inspect.BoundArguments(self.bound.signature, some)
        prediction: Tensor = self.model.forward(*bound.args, **bound.kwargs)[0]
        return prediction


def _selected(value: Any, rows: slice, count: int) -> Any:
    """Some rows of every tensor that has as many as the batch, however deep it lies."""
    if isinstance(value, Tensor):
        return value[rows] if value.ndim and value.shape[0] == count else value
    if isinstance(value, Mapping):
        return {name: _selected(item, rows, count) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_selected(item, rows, count) for item in value)
    return value


class Run:
    """The images of one run, step by step.

    Averages and Delta are per image, over the conditional row alone, and begin with the run.

    Args:
        model: The transformer of the pipeline.
        negative: What is done to it.
        steps: Of the run.

    Raises:
        InputError: If the negative cannot be had in so many steps.
    """

    def __init__(self, model: Any, negative: Negative, steps: int) -> None:
        self._contract = negative.contract
        self._oracle = family_of(negative.contract).part("oracle")
        self._blocks = self._oracle.attention_blocks(model)
        self._plan = negative.plan(steps)
        self._averages: dict[int, Tensor] = {}
        self._delta: Tensor | None = None
        self._images: int | None = None

    @property
    def emag_scale(self) -> float:
        """The scale s."""
        return self._plan.guidance.emag_scale

    def perturbed(self, index: int, call: Call, rows: slice) -> Tensor | None:
        """Run the perturbed pass of one step; None where the step does not guide.

        Args:
            index: Of the step, from 0.
            call: The pipeline's own call of the model in this step.
            rows: Its rows with the prompt, one per image.

        Returns:
            What the model predicts of those rows, all channels.

        Raises:
            ModelError: If these are not the images of the run, or the model's attention cannot be watched.
        """
        step, images = self._plan.steps[index], len(range(*rows.indices(call.rows)))
        if self._images not in (None, images):
            raise ModelError(
                f"the transformer was called for {images} images in step {index} of a run of {self._images}; "
                "leave out other guidance of the pipeline, as skip_guidance_layers"
            )
        self._images = images
        if step.phase == Phase.PLAIN:
            return None
        delta = self._delta
        if delta is None:
            delta = torch.zeros(
                images, len(self._contract.blocks), device=call.inputs["hidden_states"].device
            )
        mask = block_mask(step.choice, delta, step.strength)
        size = self._oracle.latents_size(call.inputs)
        probes = probes_of(self._contract, step, self._averages, mask, size)
        with perturbing(self._contract, self._blocks, probes):
            prediction = call.again(rows)
        if self._contract.kind.averages is not None:
            self._averages = {
                block: probe.average for block, probe in probes.items() if probe.average is not None
            }
            self._delta = torch.stack([probe.delta for probe in probes.values()], dim=1)
        return prediction if step.phase == Phase.GUIDE else None
