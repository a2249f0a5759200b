"""The denoising loop: a generator over steps, so that the caller owns the pace."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from emag_export.engines.protocol import Engine
from emag_export.runtime.guidance.clean import Clean
from emag_export.runtime.guidance.rules import Predictions, Rows
from emag_export.runtime.sampling.call import calls_of, place_calls
from emag_export.runtime.sampling.conditioning import Conditioning, Trunk
from emag_export.runtime.sampling.plan import Phase, Plan, PlannedStep
from emag_export.runtime.sampling.state import RunState
from emag_export.runtime.step import step
from emag_export.runtime.weak import WeakModel, without_perturbed_rows

__all__ = ["Anneal", "Conditioning", "DenoiseStep", "DrawNoise", "denoise"]

Anneal = Callable[[int, Conditioning], Conditioning]
"""(step index, conditioning of the run) to the conditioning of that step."""

DrawNoise = Callable[[int], Rows]
"""Step index to standard normal noise like the latents, on the engine's device."""


@dataclass(frozen=True, kw_only=True)
class DenoiseStep:
    """One finished step."""

    plan: PlannedStep
    before: Rows
    """Latents before the step."""
    run: RunState
    """After the step. Its averages are overwritten by the next step but one, and by the next run that borrows
    the same buffers; latents are not."""
    predictions: Predictions
    guided: Rows
    """The prediction that was stepped along."""
    mask: Float[Tensor, "images layers"]
    """lambda of every candidate block; zeros outside the perturb window."""

    @property
    def latents(self) -> Rows:
        """After the step, float32; the next step reads but never changes them."""
        return self.run.latents

    @property
    def clean(self) -> Rows:
        """The finished latents that this step predicts, x0: a picture while the latents are still noise."""
        return Clean.of(self.plan.p, self.plan.q).latents(self.before, self.guided)


def denoise(  # noqa: PLR0913  a run, and the three things that may come from outside
    engine: Engine,
    plan: Plan,
    run: RunState,
    conditioning: Conditioning,
    *,
    anneal: Anneal | None = None,
    noise: DrawNoise | None = None,
    weak: WeakModel | None = None,
) -> Iterator[DenoiseStep]:
    """Denoise images that go through the same plan, yielding after every step.

    A generator: the caller shows progress, takes previews and stops early by leaving its ``for``.
    Everything that is known before the run is on the device before the first step, and no step makes the
    host wait for the device: the block to perturb is chosen there.

    Args:
        engine: Runs the forked graph of ``plan.contract``.
        plan: Steps and guidance.
        run: State before the first step, of :meth:`RunState.start` or a pool, on the engine's device.
        conditioning: Per image, on the engine's device.
        anneal: Changes the conditioning of each step; CADS.
        noise: For samplers that add noise.
        weak: A weaker model whose prediction is the negative, in place of a perturbed row.

    Yields:
        Every finished step, a :class:`DenoiseStep`; the last one holds the finished latents.

    Examples:
        >>> from emag_export import Pipeline
        >>> from emag_export.runtime.keywords import request_for
        >>> from emag_export.runtime.loop import denoise
        >>> from emag_export.runtime.sampling.state import RunState
        >>> with Pipeline.open("bundle") as pipeline:
        ...     prepared = pipeline.prepare([request_for(pipeline.bundle, "a yellow ring", {"steps": 4})])
        ...     plan, text = prepared.plan, prepared.conditioning
        ...     run = RunState.start(plan.contract, prepared.latents, text.given)
        ...     for step in denoise(pipeline.denoiser, plan, run, text):
        ...         print(step.plan.index, step.plan.phase, int(step.mask.sum()))
        0 track 0
        1 guide 1
        2 guide 1
        3 plain 0
    """
    beside = None if weak is None else weak.start(plan, run.latents, conditioning)
    own = plan if weak is None else without_perturbed_rows(plan)
    calls = place_calls(calls_of(own, run.images), plan.contract, run.latents.device)
    trunk_of: tuple[Conditioning, bool] | None = None
    trunk: Trunk = {}
    for planned, call in zip(plan.steps, calls, strict=True):
        given = conditioning if anneal is None else anneal(planned.index, conditioning)
        # All images go through the same step, so that either all have an unconditional row or none.
        uncond = call.rows.uncond_images is not None
        if trunk_of is None or given is not trunk_of[0] or uncond != trunk_of[1]:
            trunk_of, trunk = (given, uncond), given.trunk(call.rows)
        z = noise(planned.index) if noise is not None and call.noise is not None else None
        before = run.latents
        negative = None
        if beside is not None and planned.phase == Phase.GUIDE:
            negative = beside.predict(planned.index, before, given)
        run, result = step(engine, call, run, trunk, noise=z, perturbed=negative)
        yield DenoiseStep(
            plan=planned,
            before=before,
            run=run,
            predictions=result.predictions,
            guided=result.guided,
            mask=result.mask,
        )
