"""EMAG as a guider of diffusers' modular pipelines."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from emag_export.diffusers_guidance.checks import TESTED, require_guider, require_model
from emag_export.diffusers_guidance.negative import NegativeKeywords, negative_of
from emag_export.diffusers_guidance.run import Call, Run
from emag_export.errors import InputError, MissingDependencyError
from emag_export.runtime.checks import require_finite
from emag_export.runtime.guidance.rules import cfg, emag

try:
    from diffusers.configuration_utils import register_to_config
    from diffusers.guiders import BaseGuidance
    from diffusers.guiders.guider_utils import GuiderOutput
except ImportError as error:
    raise MissingDependencyError(
        f"this diffusers has no guiders; pip install diffusers=={TESTED}, or use guide_pipeline"
    ) from error

__all__ = ["EMAGuidance"]

_COND, _UNCOND = "pred_cond", "pred_uncond"


class EMAGuidance(BaseGuidance):  # type: ignore[misc]
    r"""Guide a modular pipeline with EMAG, or another hard negative: :math:`u + w\,(p + s\,(c - p) - u)`.

        pipeline.update_components(guider=EMAGuidance(guidance_scale=7.0))

    The perturbed prediction p is made behind the conditional one, from the same inputs, so a pipeline makes
    the batches that it makes for CFG. Averages begin anew at step 0 of every run. Arguments that are None
    come from the defaults of the model, which the guider meets in the first step.

    Args:
        guidance_scale: w; 1 leaves out CFG and the unconditional pass, so that EMAG guides alone.
        variant: As all that follow, see :class:`~emag_export.diffusers_guidance.negative.NegativeKeywords`.
        model: Known name of the model.
        emag_candidates: Blocks that may be perturbed.
        renorm: Of partly replaced softmax rows.
        emag_scale: s.
        emag_beta: Decay of the average.
        emag_start: Averaging begins.
        emag_delta: Perturbation begins this much later.
        emag_stop: Both end.
        emag_unit: Of these three.
        emag_strength: lambda.
        emag_blocks: Perturb these in every step.
        random_blocks: Perturb so many, drawn anew in every step.
        blur_sigma: Of ``blur-query``.
        enabled: False predicts with the prompt alone, without any guidance.

    Raises:
        MissingDependencyError: If this diffusers calls guiders in another way.
        InputError: If the scale is not finite.

    Examples:
        >>> from emag_export import EMAGuidance
        >>> guider = EMAGuidance(guidance_scale=4.0, variant="emag-q", model="tiny-sd3")
        >>> guider.num_conditions, EMAGuidance(guidance_scale=1.0).num_conditions  # batches of a step
        (2, 1)

    In the first step of a run, what :func:`~emag_export.diffusers_guidance.negative.negative_of` and
    :func:`~emag_export.diffusers_guidance.checks.require_model` refuse is refused as well.

    Source:
        arXiv:2512.17303, eqs. 8-14, per image; :mod:`emag_export.kinds` names the sources of other negatives.
    """

    _input_predictions = [_COND, _UNCOND]  # noqa: RUF012  so diffusers has it

    # diffusers writes the arguments into a guider's configuration by their names.
    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(  # noqa: PLR0913
        self,
        guidance_scale: float = 7.0,
        variant: str = "emag-q",
        model: str | None = None,
        emag_candidates: Sequence[int] | None = None,
        renorm: str = "row",
        emag_scale: float | None = None,
        emag_beta: float | None = None,
        emag_start: int | None = None,
        emag_delta: int | None = None,
        emag_stop: int | None = None,
        emag_unit: str | None = None,
        emag_strength: float | None = None,
        emag_blocks: Sequence[int] | None = None,
        random_blocks: int | None = None,
        blur_sigma: float | None = None,
        enabled: bool = True,
    ) -> None:
        require_guider(BaseGuidance)
        super().__init__(enabled=enabled)
        require_finite(guidance_scale=guidance_scale)
        self.guidance_scale = guidance_scale
        self._run: Run | None = None
        self._perturbed: Tensor | None = None
        self._hook: RemovableHandle | None = None

    def set_state(self, step: int, num_inference_steps: int, timestep: Any) -> None:
        """Begin a step; step 0 begins a run.

        Args:
            step: From 0.
            num_inference_steps: Of the run.
            timestep: Of the scheduler; not looked at.
        """
        super().set_state(step, num_inference_steps, timestep)
        self._perturbed = None
        if step == 0:
            self._run = None

    def prepare_inputs(self, data: dict[str, Any]) -> list[Any]:
        """The batches of a step: with the prompt, and without it where CFG needs that.

        Args:
            data: Argument of the model to its tensor, or to a pair of those with and without the prompt.

        Raises:
            InputError: If CFG needs a prediction without the prompt and there are no pairs.
        """
        self._require_negative(any(isinstance(value, tuple) for value in data.values()))
        return [self._prepare_batch(data, index, name) for index, name in enumerate(self._passes)]

    def prepare_inputs_from_block_state(self, data: Any, input_fields: dict[str, Any]) -> list[Any]:
        """The same from a pipeline's state.

        Args:
            data: The state.
            input_fields: Argument of the model to a field of the state, or to a pair of those.

        Raises:
            InputError: As :meth:`prepare_inputs`.
        """
        pairs = [names for names in input_fields.values() if isinstance(names, tuple)]
        self._require_negative(any(getattr(data, names[1], None) is not None for names in pairs))
        return [
            self._prepare_batch_from_block_state(input_fields, data, index, name)
            for index, name in enumerate(self._passes)
        ]

    def prepare_models(self, denoiser: Any) -> None:
        """Before a pass: the one with the prompt will be followed by the perturbed one.

        Args:
            denoiser: The transformer.

        Raises:
            ModelError: If it cannot be guided.
            InputError: If it has no such negative.
        """
        super().prepare_models(denoiser)
        self._release()
        if not (self._enabled and self.is_conditional):
            return
        if self._run is None:
            family = require_model(denoiser)
            words: Any = {name: self.config[name] for name in NegativeKeywords.__annotations__}
            self._run = Run(denoiser, negative_of(family, denoiser.config, words), self._num_inference_steps)
        self._hook = denoiser.register_forward_hook(self._behind, with_kwargs=True, always_call=True)

    def cleanup_models(self, denoiser: Any) -> None:
        """After a pass: the transformer is its own again.

        Args:
            denoiser: The transformer.
        """
        super().cleanup_models(denoiser)
        self._release()

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> Any:
        """The prediction to step along.

        Args:
            pred_cond: c.
            pred_uncond: u, None where CFG needs none.

        Returns:
            A ``GuiderOutput``; what it names the conditional prediction is c itself.
        """
        guided = pred_cond.float()
        if self._perturbed is not None and self._run is not None:
            guided = emag(guided, self._perturbed.float(), self._run.emag_scale)
        if self._step == self._num_inference_steps - 1:
            self._run = self._perturbed = None  # averages may be large, and nobody says that a run has ended
        if pred_uncond is not None:
            guided = cfg(pred_uncond.float(), guided, self.guidance_scale)
        return GuiderOutput(pred=guided.to(pred_cond.dtype), pred_cond=pred_cond, pred_uncond=pred_uncond)

    @property
    def is_conditional(self) -> bool:
        """Whether the pass that was prepared last has the prompt."""
        return bool(self._count_prepared == 1)

    @property
    def num_conditions(self) -> int:
        """Batches of a step."""
        return len(self._passes)

    @property
    def _passes(self) -> list[str]:
        """By index in the pairs of :meth:`prepare_inputs`."""
        return [_COND, _UNCOND] if self._enabled and self.guidance_scale != 1 else [_COND]

    def _require_negative(self, given: bool) -> None:
        if _UNCOND in self._passes and not given:
            raise InputError(
                f"at a `guidance_scale` of {self.guidance_scale} CFG needs a prediction without the prompt: "
                'give a `negative_prompt`, if only "", or take a `guidance_scale` of 1 for EMAG alone'
            )

    def _behind(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Run the perturbed pass of this step; the conditional one has just ended, or failed."""
        self._release()
        if output is not None and self._run is not None:
            call = Call.of(model, args, kwargs)
            self._perturbed = self._run.perturbed(self._step, call, slice(0, call.rows))

    def _release(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
