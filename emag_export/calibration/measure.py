"""Measure the ranges of activations: one largest value per linear over steps, prompts and all rows."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from emag_export.bundle import Bundle
from emag_export.calibration.open import TextEncoders, opened_denoiser
from emag_export.calibration.progress import Saved, load_progress, save_progress
from emag_export.calibration.stand_in import stand_in
from emag_export.calibration.watch import Watch
from emag_export.engines.protocol import Engine
from emag_export.exporter.describe.identify import BuildPlan
from emag_export.progress import Event, Progress, silent
from emag_export.runtime.guidance.rules import GUIDANCES
from emag_export.runtime.loop import denoise
from emag_export.runtime.prepare import Prepared, prepare
from emag_export.runtime.request import GenerationRequest, default_request
from emag_export.runtime.sampling.plan import EmagWindows
from emag_export.runtime.sampling.state import RunState
from emag_export.runtime.text.encoders import opened_encoder

__all__ = ["measure_ranges"]

_CPU = torch.device("cpu")
_WHOLE_RUN = EmagWindows(start=250, delta=0, stop=0)
"""Averages from the first step to the last, and a perturbed row in all of them."""


def measure_ranges(plan: BuildPlan, folder: Path, progress: Progress = silent) -> dict[str, float]:
    """Draw the calibration's prompts with the fork in PyTorch, and watch its linears and attentions.

    Weights are read when their layers run, so no model need fit into memory. Called again after an
    interruption, it goes on with the next step.

    Args:
        plan: Of the bundle to be; its quantisation says what is drawn.
        folder: Existing folder for what is needed meanwhile, of this calibration alone.
        progress: Told after every step.

    Returns:
        Linear, or part of an attention, to its largest absolute value, sorted by name.

    Raises:
        ModelError: If weights cannot be loaded.
        InputError: If the calibration does not fit the model.
    """
    assert plan.quantisation is not None, "there is nothing to calibrate"
    calibration = plan.quantisation.calibration
    assert calibration is not None, "identify fills it in"
    home = folder / "stand-in"
    home.mkdir(exist_ok=True)
    bundle = stand_in(plan, home)
    requests = [
        _request(bundle, prompt, seed, calibration.steps, calibration.pixels)
        for seed, prompt in enumerate(calibration.prompts)
    ]
    progress(Event(component="calibration", phase="encode"))
    with opened_encoder(bundle, TextEncoders(plan)) as encode:
        runs = [prepare(bundle, [request], encode, _CPU) for request in requests]
    saved = load_progress(folder)
    watch = Watch(dict(saved.ranges))
    total = calibration.steps * len(runs)
    with opened_denoiser(plan, bundle.contract) as (model, engine), watch.over(model):
        for number in range(saved.prompt, len(runs)):
            first = saved.step if number == saved.prompt else 0
            run = saved.run if number == saved.prompt else None
            for done, state in _steps(engine, runs[number], watch, first, run):
                save_progress(folder, _saved(number, done, calibration.steps, state, watch))
                done_in_all = number * calibration.steps + done
                progress(Event(component="calibration", phase="step", done=done_in_all, total=total))
    return dict(sorted(watch.ranges.items()))


def _request(bundle: Bundle, prompt: str, seed: int, steps: int, pixels: int) -> GenerationRequest:
    base = default_request(bundle, prompt)
    name = base.guidance.name
    if not base.guidance.rule.perturbed:
        name = "emag" if GUIDANCES[name].uncond else "emag-only"
    return replace(
        base,
        seed=seed,
        steps=steps,
        height=pixels,
        width=pixels,
        guidance=replace(base.guidance, name=name),
        windows=_WHOLE_RUN,
    )


def _steps(
    engine: Engine, prepared: Prepared, watch: Watch, first: int, run: RunState | None
) -> Iterator[tuple[int, RunState]]:
    """The number of finished steps, and the state behind them, from step ``first`` on."""
    if run is None:
        run = RunState.start(prepared.plan.contract, prepared.latents, prepared.conditioning.given)
    noise = prepared.noise
    for index in range(first if noise is not None else 0):
        noise(index)  # type: ignore[misc]  # as drawn before the interruption
    rest = replace(prepared.plan, steps=prepared.plan.steps[first:])
    steps = denoise(engine, rest, run, prepared.conditioning, anneal=prepared.anneal, noise=noise)
    with closing(steps):  # type: ignore[type-var]
        while True:
            with watch.one_call():
                step: Any = next(steps, None)
            if step is None:
                return
            yield step.plan.index + 1, step.run


def _saved(number: int, done: int, steps: int, state: RunState, watch: Watch) -> Saved:
    if done == steps:
        return Saved(prompt=number + 1, step=0, run=None, ranges=watch.ranges)
    return Saved(prompt=number, step=done, run=state, ranges=watch.ranges)
