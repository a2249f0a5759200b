"""Guide a plain pipeline of diffusers: its transformer answers with the guided conditional prediction.

The pipeline's own CFG does the rest: of u and p + s (c - p) it makes u + w (p + s (c - p) - u).
"""

from dataclasses import fields, replace
from types import TracebackType
from typing import Any, Self, Unpack

import torch
from torch import Tensor

from emag_export.diffusers_guidance.checks import require_pipeline, require_scheduler
from emag_export.diffusers_guidance.negative import Negative, NegativeKeywords, negative_of
from emag_export.diffusers_guidance.run import Call, Run
from emag_export.errors import InputError, ModelError
from emag_export.families import family_of
from emag_export.runtime.guidance.rules import emag

__all__ = ["GuidedPipeline", "guide_pipeline"]


def guide_pipeline(pipeline: Any, **words: Unpack[NegativeKeywords]) -> "GuidedPipeline":
    """Let a diffusers pipeline guide with EMAG, or another hard negative, until :meth:`GuidedPipeline.undo`.

    The pipeline is called as always, with its own guidance scale; at 1 or below it has no CFG, and EMAG
    guides alone. Weights, configuration and classes stay as they are.

    Args:
        pipeline: Of one of the classes that :data:`emag_export.families.FAMILIES` names, not compiled.
        **words: See :class:`~emag_export.diffusers_guidance.negative.NegativeKeywords`.

    Returns:
        What guides it, until its ``with`` is left or :meth:`GuidedPipeline.undo` is called.

    Raises:
        ModelError: If the pipeline is of another class, or of a diffusers that it cannot be guided in.
        InputError: If it is guided already; or as
            :func:`~emag_export.diffusers_guidance.negative.negative_of`.

    Examples:
        >>> from diffusers import StableDiffusion3Pipeline
        >>> from emag_export import guide_pipeline
        >>> from emag_export.tiny_sd3 import MODEL_DIR
        >>> pipeline = StableDiffusion3Pipeline.from_pretrained(MODEL_DIR)
        >>> asked = {"height": 64, "width": 64, "num_inference_steps": 4, "guidance_scale": 4.0}
        >>> with guide_pipeline(pipeline, variant="emag-q", model="tiny-sd3"):
        ...     pipeline("a small yellow ring", **asked).images[0].size
        (64, 64)

    Source:
        arXiv:2512.17303, eqs. 8-14, per image; :mod:`emag_export.kinds` names the sources of other negatives.
    """
    family = require_pipeline(pipeline)
    model = pipeline.transformer
    if any(
        isinstance(getattr(hook, "__self__", None), GuidedPipeline) for hook in model._forward_hooks.values()
    ):
        raise InputError("this pipeline is guided already; undo that first")
    return GuidedPipeline(pipeline, negative_of(family, model.config, words))


class GuidedPipeline:
    """A pipeline that is guided; leave the ``with``, or call :meth:`undo`, and it is its own again.

    Everything that calls the transformer meanwhile is guided, so let one pipeline at a time use it.

    Args:
        pipeline: What is guided.
        negative: How.
    """

    def __init__(self, pipeline: Any, negative: Negative) -> None:
        self._pipeline, self._negative = pipeline, negative
        self._oracle = family_of(negative.contract).part("oracle")
        self._model: Any = pipeline.transformer
        self._run: Run | None = None
        self._timesteps: Tensor | None = None
        self._index = 0
        self._step: tuple[Tensor, int | None] | None = None
        self._hook = self._model.register_forward_hook(self._guided, with_kwargs=True)

    def undo(self) -> None:
        """Take the guidance away and free the averages; a second time does nothing."""
        self._hook.remove()
        self._run = self._timesteps = self._step = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def _guided(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """What the pipeline gets in place of the model's output."""
        if self._is_unconditional():
            return output
        run, index = self._next_step()
        call = Call.of(model, args, kwargs)
        rows = self._oracle.cond_rows(self._pipeline, call.inputs)
        perturbed = run.perturbed(index, call, rows)
        if perturbed is None:
            return output
        prediction: Tensor = output[0].clone()
        channels = slice(None)
        if self._negative.contract.out_channels > self._negative.contract.channels:
            channels = slice(0, self._negative.contract.channels)  # behind them is the learned variance
        cond, p = prediction[rows, channels].float(), perturbed[:, channels].float()
        prediction[rows, channels] = emag(cond, p, run.emag_scale).to(prediction.dtype)
        return _with_prediction(output, prediction)

    def _is_unconditional(self) -> bool:
        """Whether this is a second call in the same step, of pipelines that call their model so."""
        if not self._oracle.SEPARATE_CALLS:
            return False
        scheduler = self._pipeline.scheduler
        step = (scheduler.timesteps, scheduler.step_index)
        before, self._step = self._step, step
        return before is not None and before[0] is step[0] and before[1] == step[1]

    def _next_step(self) -> tuple[Run, int]:
        """The run that the pipeline is in, and its step: every run begins with timesteps of its own."""
        scheduler = self._pipeline.scheduler
        timesteps = scheduler.timesteps
        if self._run is None or timesteps is not self._timesteps:
            require_scheduler(scheduler)
            self._run, self._index = Run(self._model, self._negative, len(timesteps)), 0
            self._timesteps = timesteps
        index, self._index = self._index, self._index + 1
        if index >= len(timesteps):
            raise ModelError(
                f"the transformer was called {index + 1} times in a run of {len(timesteps)} steps; while it "
                "is guided, call it through its pipeline alone"
            )
        return self._run, index


def _with_prediction(output: Any, prediction: torch.Tensor) -> Any:
    """The model's output, a tuple or a record, with another prediction."""
    if isinstance(output, tuple):
        return (prediction, *output[1:])
    return replace(output, **{fields(output)[0].name: prediction})
