"""What pictures cannot show: how far the hard negative lies from the prompt, step by step, and seconds.

A probe is one more run of a picture, alone, whose predictions are looked at. It is kept in a file of its own.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from emag_export.evaluation.scoring import rounded
from emag_export.evaluation.settings import Setting
from emag_export.evaluation.trials import Trials
from emag_export.hashing import hash_json
from emag_export.runtime.pipeline import Pipeline
from emag_export.runtime.request import GenerationRequest

__all__ = ["contrasts", "probe", "seconds"]

_FOLDER = "probes"


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


def contrasts(trials: Trials, count: int) -> dict[str, list[tuple[int, float]]]:
    """Mean of ``|c - p| / |c - u|`` over prompts, per step in which all three predictions are there.

    Args:
        trials: Probed.
        count: Prompts.

    Returns:
        Label of each setting that has such steps to pairs of step and ratio.
    """
    rows: dict[str, list[dict[str, Any]]] = {}
    for place in _places(trials, count):
        if (found := place.read()) is not None and found["ratios"]:
            rows.setdefault(place.setting.label, []).append(dict(found["ratios"]))
    return {
        label: [(int(step), fmean(row[step] for row in found)) for step in found[0]]
        for label, found in rows.items()
    }


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
                key=hash_json([fingerprint, asdict(request)]),
                request=request,
            )


def _run(pipeline: Pipeline, request: GenerationRequest) -> Mapping[str, Any]:
    """One picture alone; its latents are not decoded. Ratios are taken after the clock has stopped."""
    prepared = pipeline.prepare([request])
    kept = []
    began = time.perf_counter()
    for step in pipeline.denoise(prepared):
        found = step.predictions
        if found.uncond is not None and found.perturbed is not found.cond:
            kept.append((step.plan.index, found))
    step.latents.sum().item()  # waits for the device
    took = time.perf_counter() - began
    ratios = []
    for index, found in kept:
        assert found.uncond is not None
        near, far = (float((found.cond - other).norm()) for other in (found.perturbed, found.uncond))
        if far > 0:
            ratios.append((index, rounded(near / far)))
    return {"ratios": ratios, "seconds": took}
