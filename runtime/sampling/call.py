"""What one call does for every image in it, as plain data and as tensors on the engine's device."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from emag_export.contract import DenoiserContract
from emag_export.runtime.device import to_device
from emag_export.runtime.guidance.apg import ApgTerms
from emag_export.runtime.guidance.clean import Clean
from emag_export.runtime.guidance.rules import Guidance, GuidanceRule, Terms
from emag_export.runtime.sampling.plan import Phase, Plan, PlannedStep
from emag_export.runtime.sampling.rows import PlacedRows, place_rows

__all__ = ["Group", "ImageStep", "Noise", "PlacedCall", "calls_of", "place_calls"]


@dataclass(frozen=True, kw_only=True)
class ImageStep:
    """What one call does for one image: images of a call may differ in everything here."""

    step: PlannedStep
    guidance: Guidance


@dataclass(frozen=True, kw_only=True)
class Group:
    """Images of a call with whose predictions the same is done."""

    rule: GuidanceRule
    images: Int[Tensor, " grouped"] | None
    """Which they are; None for all."""
    terms: Terms
    """Numbers of each, which may differ."""


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Bounds of the log of the variance of the noise that a step adds; images that get none have weight 0."""

    weight: Float[Tensor, "images ..."]
    low: Float[Tensor, "images ..."]
    high: Float[Tensor, "images ..."]


@dataclass(frozen=True, kw_only=True)
class PlacedCall:
    """A call on the device, so that nothing has to be copied there when its turn comes."""

    rows: PlacedRows
    timestep: Float[Tensor, " trunk_rows"]
    ema_step: Float[Tensor, " images"]
    guides: bool
    """Some image is perturbed."""
    chosen: Float[Tensor, "images layers"]
    """lambda of blocks that were chosen before the run."""
    by_delta: Float[Tensor, "images 1"] | None
    """lambda of the block that Delta chooses; None where no image lets it."""
    measures: Float[Tensor, "images 1"] | bool
    """Whether the Delta of this call counts, per image or for all: not while nothing is averaged, nor at the
    first accumulation, which has nothing older to differ from."""
    a: Float[Tensor, "images ..."]
    b: Float[Tensor, "images ..."]
    noise: Noise | None
    blur_sigmas: tuple[float, ...]
    """Per image; for negatives that blur."""
    groups: tuple[Group, ...]


def calls_of(plan: Plan, images: int) -> list[list[ImageStep]]:
    """The calls of a run in which all images go through the same plan.

    Args:
        plan: Of the run.
        images: How many.

    Returns:
        One list per step, with an entry per image.
    """
    return [[ImageStep(step=step, guidance=plan.guidance)] * images for step in plan.steps]


def place_calls(
    calls: Sequence[Sequence[ImageStep]], contract: DenoiserContract, device: torch.device
) -> tuple[PlacedCall, ...]:
    """Put calls on a device, in one host-to-device copy besides layouts that are new to it.

    Args:
        calls: What each call does, one :class:`ImageStep` per image; all for the same number of images.
        contract: Of the graph.
        device: Where the engine runs.
    """
    none = (0.0,) * len(contract.blocks)
    table = torch.tensor([[_numbers(step, none) for step in steps] for steps in calls], dtype=torch.float32)
    return tuple(
        _placed(steps, numbers, len(contract.latents))
        for steps, numbers in zip(calls, to_device(table, device), strict=True)
    )


_COLUMNS = (
    *("timestep", "ema_step", "by_delta", "measures", "a", "b", "p", "q", "divisor"),
    *("noise", "low", "high", "scale", "emag_scale", "rescale"),
    *("apg_gain", "apg_eta", "apg_norm_threshold", "apg_momentum"),
)
"""Numbers of an image in a call; one column per candidate block follows, with lambda of blocks that are
chosen."""


def _numbers(image: ImageStep, none: tuple[float, ...]) -> list[float]:
    step, guidance, apg = image.step, image.guidance, image.guidance.apg.terms
    low, high = step.log_variance or (0.0, 0.0)
    chosen = step.choice is not None
    return [
        *(step.timestep, step.ema_step, 0.0 if chosen else step.strength, float(_measures(step))),
        *(step.a, step.b, step.p, step.q, Clean.divisor_of(step.q)),
        *(float(step.log_variance is not None), low, high),
        *(guidance.scale, guidance.emag_scale, guidance.rescale),
        *(float(x) for x in (apg.gain, apg.eta, apg.norm_threshold, apg.momentum)),
        *(step.strength * x for x in (none if step.choice is None else step.choice)),
    ]


def _measures(step: PlannedStep) -> bool:
    return step.phase != Phase.PLAIN and not step.starts_average


def _placed(images: Sequence[ImageStep], table: Float[Tensor, "images columns"], axes: int) -> PlacedCall:
    column = dict(zip(_COLUMNS, table.unbind(dim=1), strict=False))
    steps = [image.step for image in images]
    rows = place_rows(
        tuple(step.phase for step in steps),
        tuple(step.rule.uncond for step in steps),
        table.device,
    )
    wide = partial(torch.Tensor.reshape, shape=(-1, *[1] * axes))
    measures = {_measures(step) for step in steps}
    noisy = any(step.log_variance is not None for step in steps)
    return PlacedCall(
        rows=rows,
        timestep=column["timestep"].index_select(0, rows.trunk_images),
        ema_step=column["ema_step"].contiguous(),
        guides=any(step.phase == Phase.GUIDE for step in steps),
        chosen=table[:, len(_COLUMNS) :],
        by_delta=column["by_delta"][:, None] if any(step.choice is None for step in steps) else None,
        measures=measures.pop() if len(measures) == 1 else column["measures"][:, None],
        a=wide(column["a"]),
        b=wide(column["b"]),
        noise=Noise(weight=wide(column["noise"]), low=wide(column["low"]), high=wide(column["high"]))
        if noisy
        else None,
        blur_sigmas=tuple(step.blur_sigma for step in steps),
        groups=tuple(_groups(images, {name: wide(values) for name, values in column.items()})),
    )


def _groups(images: Sequence[ImageStep], column: dict[str, Tensor]) -> list[Group]:
    """Images by rule; the numbers of each group as tensors."""
    by_rule: dict[GuidanceRule, list[int]] = {}
    for position, image in enumerate(images):
        by_rule.setdefault(image.step.rule, []).append(position)
    groups = []
    for rule, members in by_rule.items():
        index: Tensor | None = None
        numbers = column
        if len(by_rule) > 1:
            index = to_device(torch.tensor(members), column["a"].device)
            numbers = {name: values.index_select(0, index) for name, values in column.items()}
        groups.append(Group(rule=rule, images=index, terms=_terms(numbers)))
    return groups


def _terms(numbers: dict[str, Tensor]) -> Terms:
    return Terms(
        scale=numbers["scale"],
        emag_scale=numbers["emag_scale"],
        rescale=numbers["rescale"],
        apg=ApgTerms(
            gain=numbers["apg_gain"],
            eta=numbers["apg_eta"],
            norm_threshold=numbers["apg_norm_threshold"],
            momentum=numbers["apg_momentum"],
        ),
        clean=Clean(p=numbers["p"], q=numbers["q"], divisor=numbers["divisor"]),
    )
