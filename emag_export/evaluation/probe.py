"""What pictures cannot show: where the hard negative lies, step by step, and seconds.

A probe is one more run of a picture, alone, whose predictions are looked at. It is kept in a file of its own.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from emag_export.evaluation.scoring import rounded
from emag_export.evaluation.settings import Setting
from emag_export.evaluation.trials import Trials
from emag_export.hashing import hash_json
from emag_export.runtime.pipeline import Pipeline
from emag_export.runtime.request import GenerationRequest

__all__ = ["Contrast", "contrasts", "fineness", "probe", "seconds"]

_FOLDER = "probes"
_FORMAT = 3
"""Of what is kept; older files are probed again."""


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """Where the hard negative lies in one step."""

    step: int
    ratio: float
    """``|c - p| / |c - u|``."""
    near: float
    """Mean spatial frequency of ``c - p``, cycles per latent pixel."""
    far: float
    """Of ``c - u``."""
    blocks: tuple[int, ...]
    """That were perturbed, those of every prompt behind one another."""


@dataclass(frozen=True, kw_only=True)
class _Place:
    """One probe: what is run, and where it is kept."""

    setting: Setting
    path: Path
    key: str
    request: GenerationRequest

    def read(self) -> dict[str, Any] | None:
        """What is kept, if it is of this request."""
        if not self.path.exists():
            return None
        found: dict[str, Any] = json.loads(self.path.read_text("utf-8"))
        return found if found["key"] == self.key else None


def probe(
    trials: Trials, count: int, open_pipeline: Callable[[], Pipeline], tell: Callable[[], None] = lambda: None
) -> None:
    """Run the first seed of the first prompts at every setting, those that are kept aside.

    Settings take turns within a prompt, so that a machine that slows down slows all of them.

    Args:
        trials: Of one bundle.
        count: Prompts.
        open_pipeline: Called only if something is to be run.
        tell: Told after every run.
    """
    with ExitStack() as stack:
        pipeline: Pipeline | None = None
        for place in _places(trials, count):
            if place.read() is None:
                if pipeline is None:
                    pipeline = stack.enter_context(open_pipeline())
                    _run(pipeline, place.request)  # the first run of an engine is slower than others
                record = {"key": place.key, **_run(pipeline, place.request)}
                place.path.parent.mkdir(parents=True, exist_ok=True)
                partial = place.path.with_name(f".{place.path.name}.partial")
                partial.write_text(json.dumps(record) + "\n", "utf-8")
                partial.replace(place.path)
            tell()


def contrasts(trials: Trials, count: int) -> dict[str, list[Contrast]]:
    """Where ``p`` lies, mean over prompts, in every step in which all three predictions are there.

    Args:
        trials: Probed.
        count: Prompts.

    Returns:
        Label of each setting that has such steps to what was found there.
    """
    rows: dict[str, list[list[Contrast]]] = {}
    for place in _places(trials, count):
        if (found := place.read()) is not None and found["contrasts"]:
            rows.setdefault(place.setting.label, []).append(
                [Contrast(**{**row, "blocks": tuple(row["blocks"])}) for row in found["contrasts"]]
            )
    return {label: [_mean(step) for step in zip(*found, strict=True)] for label, found in rows.items()}


def _mean(rows: Sequence[Contrast]) -> Contrast:
    """Of one step of several prompts."""
    return Contrast(
        step=rows[0].step,
        ratio=fmean(row.ratio for row in rows),
        near=fmean(row.near for row in rows),
        far=fmean(row.far for row in rows),
        blocks=tuple(block for row in rows for block in row.blocks),
    )


def seconds(trials: Trials, count: int) -> dict[str, float]:
    """Median seconds of a run's steps per setting: of this machine, and of the day it was measured."""
    rows: dict[str, list[float]] = {}
    for place in _places(trials, count):
        if (found := place.read()) is not None:
            rows.setdefault(place.setting.label, []).append(found["seconds"])
    return {label: round(median(found), 4) for label, found in rows.items()}


def _places(trials: Trials, count: int) -> Iterator[_Place]:
    fingerprint = trials.bundle.provenance.fingerprint
    for number in range(min(count, len(trials.prompts))):
        for setting in trials.settings:
            request = next(trials.items_of(setting, number)).request
            yield _Place(
                setting=setting,
                path=trials.output / _FOLDER / setting.folder / f"{number:06d}.json",
                key=hash_json([_FORMAT, fingerprint, asdict(request)]),
                request=request,
            )


def _run(pipeline: Pipeline, request: GenerationRequest) -> Mapping[str, Any]:
    """One picture alone, not decoded. Predictions are looked at after the clock has stopped."""
    prepared = pipeline.prepare([request])
    kept = []
    began = time.perf_counter()
    for step in pipeline.denoise(prepared):
        found = step.predictions
        if found.uncond is not None and found.perturbed is not found.cond:
            kept.append((step.plan.index, found, step.mask[0]))
    step.latents.sum().item()  # waits for the device
    took = time.perf_counter() - began
    rows, blocks = [], pipeline.bundle.contract.blocks
    for index, found, mask in kept:
        assert found.uncond is not None
        near, far = found.cond - found.perturbed, found.cond - found.uncond
        if float(far.norm()) > 0:
            ratio = rounded(float(near.norm() / far.norm()))
            chosen = [block for block, share in zip(blocks, mask.tolist(), strict=True) if share > 0]
            frequencies = {"near": fineness(near), "far": fineness(far)}
            rows.append({"step": index, "ratio": ratio, **frequencies, "blocks": chosen})
    return {"contrasts": rows, "seconds": took}


def fineness(change: Float[Tensor, "images channels height width"]) -> float:
    """Mean spatial frequency of a change of the prediction, weighted by its power.

    Returns:
        Cycles per latent pixel: 0 is a constant, 0.5 the finest stripes along an axis; white noise has 0.38.
    """
    power = torch.fft.fft2(change.double()).abs().square().sum((0, 1))
    down, across = (torch.fft.fftfreq(size, device=power.device) for size in power.shape)
    frequency = torch.hypot(down[:, None], across[None, :])
    found = rounded(float((power * frequency).sum() / power.sum().clamp(min=1e-30)))
    assert found is not None
    return found
