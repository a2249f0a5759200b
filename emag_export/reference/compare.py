"""Hold an engine against the reference: step by step on the reference's state, then on its own."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from emag_export.engines.protocol import Engine
from emag_export.errors import InputError
from emag_export.progress import Event, Progress, silent
from emag_export.quantisation import Scheme
from emag_export.reference.comparison import (
    USUAL_LATENT,
    Choice,
    Comparison,
    FreeStep,
    PicturePair,
    StepComparison,
)
from emag_export.reference.forced import force_step
from emag_export.reference.thresholds import judged_as
from emag_export.reference.two_pass import ReferenceStep
from emag_export.runtime.guidance.rules import Rows
from emag_export.runtime.loop import Conditioning, denoise
from emag_export.runtime.pictures.decode import Pictures
from emag_export.runtime.sampling.plan import Phase, Plan
from emag_export.runtime.sampling.state import RunState

__all__ = ["Decode", "Pictures", "compare"]

Decode = Callable[[Rows], Pictures]
"""Finished latents to pictures."""

_SSIM_WINDOW = 7


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """What the free run needs of a reference step; averages are large and are let go."""

    conditioning: Conditioning
    mask: Tensor
    latents: Rows
    noise: Rows | None


def compare(
    engine: Engine,
    plan: Plan,
    reference: Iterable[ReferenceStep],
    *,
    decode: Decode | None = None,
    scheme: Scheme | None = None,
    progress: Progress = silent,
) -> Comparison:
    """Compare an engine with the reference, twice.

    *Teacher-forced*: in every step the engine gets the latents, averages, conditioning and block choice
    of the reference, so that an error is this step's own. *Free-running*: from the same noise the engine
    follows its own state and choices, which shows what a user gets.

    Args:
        engine: Runs the forked graph of ``plan.contract``, on any device.
        plan: The one the reference follows.
        reference: Steps of :func:`two_pass_denoise`, on any device, with or without a floor; an iterator
            is consumed as it comes, so only one step's averages are in memory.
        decode: Makes pictures of the finished latents; without it none are compared.
        scheme: Of the engine's quantisation, which decides what is allowed.
        progress: Told after every step of both runs.

    Raises:
        InputError: If there is no step, or the reference follows another plan.
    """
    kept: list[_Kept] = []
    noise: Rows | None = None
    steps = []
    total = 2 * len(plan.steps)
    for step in reference:
        if step.plan not in plan.steps[len(kept) : len(kept) + 1]:
            raise InputError(
                f"step {step.plan.index} of the reference is not step {len(kept)} of the plan; "
                "make both with the same make_plan(...)"
            )
        noise = step.latents_before if noise is None else noise
        steps.append(_compare_step(engine, plan, step))
        kept.append(
            _Kept(conditioning=step.conditioning, mask=step.mask, latents=step.latents, noise=step.noise)
        )
        progress(Event(component="comparison", phase="step", done=len(kept), total=total))
    if noise is None:
        raise InputError(
            "the reference has no step; give a fresh two_pass_denoise(...) or a list of its steps"
        )
    free, latents = _free_run(engine, plan, noise, kept, progress)
    return Comparison(
        settings=_settings(engine, plan, noise),
        precision=judged_as(plan.contract.precision, plan.contract.state_dtype, scheme),
        blocks=plan.contract.blocks,
        steps=tuple(steps),
        free=free,
        pictures=() if decode is None else _compare_pictures(decode(kept[-1].latents), decode(latents)),
    )


def _compare_step(engine: Engine, plan: Plan, step: ReferenceStep) -> StepComparison:
    planned, forced = step.plan, force_step(engine, plan, step)
    chooses = planned.phase != Phase.PLAIN and plan.contract.kind.averages is not None
    return StepComparison(
        index=planned.index,
        phase=planned.phase,
        sigma=planned.sigma,
        errors=forced.errors,
        floor=step.floor,
        direction=forced.direction,
        direction_floors=step.direction_floors,
        reference_delta=_rows(step.delta),
        engine_delta=_rows(forced.delta),
        choices=_choices(plan.contract.blocks, step.delta, forced.delta) if chooses else (),
    )


def _choices(blocks: Sequence[int], reference: Tensor, engine: Tensor) -> tuple[Choice, ...]:
    choices = []
    for wanted, got in zip(reference, engine, strict=True):
        first, second = [*wanted.sort(descending=True).values.tolist(), 0.0][:2]
        choices.append(
            Choice(
                reference=blocks[int(wanted.argmax())],
                engine=blocks[int(got.argmax())],
                gap=(first - second) / first if first else 0.0,
            )
        )
    return tuple(choices)


def _free_run(
    engine: Engine,
    plan: Plan,
    noise: Rows,
    kept: Sequence[_Kept],
    progress: Progress,
) -> tuple[tuple[FreeStep, ...], Rows]:
    """The engine's own run, and its latents after the reference's last step.

    The reference's conditioning and noise of each step are replayed, so what is random is the same on both
    sides.
    """
    conditionings = [step.conditioning.to(engine.device) for step in kept]
    run = RunState.start(plan.contract, noise.to(engine.device), conditionings[0].given)
    noises = [None if step.noise is None else step.noise.to(engine.device) for step in kept]

    def drawn(index: int) -> Rows:
        found = noises[index]
        return torch.zeros_like(run.latents) if found is None else found

    anneal = partial(_replayed, conditionings)
    own = denoise(engine, plan, run, conditionings[0], anneal=anneal, noise=drawn)
    free, latents = [], noise
    for done, (wanted, got) in enumerate(zip(kept, own, strict=False), start=1):
        latents = got.latents.to(wanted.latents.device)
        free.append(
            FreeStep(
                index=got.plan.index,
                phase=got.plan.phase,
                max_abs=float((latents - wanted.latents).abs().max()),
                reference_blocks=_perturbed_blocks(plan.contract.blocks, wanted.mask),
                engine_blocks=_perturbed_blocks(plan.contract.blocks, got.mask),
                size=max(1.0, float(wanted.latents.abs().max()) / USUAL_LATENT),
            )
        )
        total = 2 * len(plan.steps)
        progress(Event(component="comparison", phase="step", done=len(kept) + done, total=total))
        if done == len(kept):
            break  # before asking for a step that the reference does not have
    return tuple(free), latents


def _replayed(steps: Sequence[Conditioning], index: int, conditioning: Conditioning) -> Conditioning:
    return steps[index]


def _compare_pictures(reference: Pictures, engine: Pictures) -> tuple[PicturePair, ...]:
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    pairs = []
    for wanted, got in zip(reference, engine, strict=True):
        side = min(wanted.shape[:2])
        if side < 3:
            raise InputError(f"decode gave pictures of {side} pixels, structural similarity needs at least 3")
        identical = bool((wanted == got).all())
        ssim = structural_similarity(
            wanted, got, channel_axis=2, data_range=255, win_size=min(_SSIM_WINDOW, side - 1 + side % 2)
        )
        psnr = float("inf") if identical else float(peak_signal_noise_ratio(wanted, got, data_range=255))
        pairs.append(PicturePair(reference=wanted, engine=got, psnr=psnr, ssim=float(ssim)))
    return tuple(pairs)


def _settings(engine: Engine, plan: Plan, noise: Rows) -> Mapping[str, str]:
    contract, guidance, windows = plan.contract, plan.guidance, plan.windows
    return {
        "engine": engine.name,
        "reference": "two full passes per step, diffusers, float32",
        "variant": contract.variant.value,
        "renormalisation": contract.renorm.value,
        "candidate blocks": ", ".join(map(str, contract.blocks)),
        "precision": f"{contract.precision}, {contract.described_state}",
        "guidance": f"{guidance.name}: {guidance.rule.summary}",
        "modifiers": "; ".join(guidance.modifiers) or "none",
        "scales": f"w = {guidance.scale:g}, s = {guidance.emag_scale:g}",
        "windows": f"start {windows.start}, delta {windows.delta}, stop {windows.stop}, in {windows.unit}; "
        f"beta {windows.beta:g}, lambda {windows.strength:g}",
        "steps": str(len(plan.steps)),
        "latents": " x ".join(map(str, noise.shape)),
    }


def _rows(values: Float[Tensor, "images layers"]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in values.tolist())


def _perturbed_blocks(blocks: Sequence[int], mask: Tensor) -> tuple[tuple[int, ...], ...]:
    return tuple(
        tuple(block for block, strength in zip(blocks, row, strict=True) if strength > 0)
        for row in mask.tolist()
    )
