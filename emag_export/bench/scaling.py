"""How the cost of EMAG over CFG grows, one axis at a time, beside what the row-blocks predict."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from emag_export.bench.contender import forked
from emag_export.bench.race import Result, race
from emag_export.bench.session import Entry, Setup, load_original, measure
from emag_export.bundle import Bundle
from emag_export.engines.eager import EagerEngine
from emag_export.errors import InputError
from emag_export.exporter.graph.fork import fork
from emag_export.progress import Event, Progress, silent
from emag_export.runtime.request import GenerationRequest
from emag_export.sizes import side_pixels

__all__ = ["AXES", "Point", "measure_scaling"]

_SHORT = 6
"""Steps that are run where only the time of each phase is wanted; the default windows have all three."""

AXES = {
    "image tokens": (256, 1024, 4096),
    "images": (1, 4),
    "steps": (4, 10, 28),
    "first candidate": (0.0, 0.25, 0.5, 0.75),
}
"""What is varied, and how; the first candidate block as a share of the model's depth."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """Cost over CFG at one value of one axis."""

    axis: str
    value: float
    ratio: float
    low: float
    high: float
    row_blocks: float
    """Predicted ratio."""
    seconds: float
    """Of a run for one image."""
    engine: str

    @property
    def deviation(self) -> float:
        """Measured over predicted, minus one."""
        return self.ratio / self.row_blocks - 1


def measure_scaling(
    setup: Setup, *, axes: Sequence[str] | None = None, progress: Progress = silent
) -> list[Point]:
    """CFG and EMAG on the first bundle and the first backend, at every value of every axis.

    Except for the number of steps itself, the phases are timed in a short run, and their times make up the
    run of ``setup.request``.

    Args:
        setup: Says where to start from.
        axes: Of :data:`AXES`; None takes all.
        progress: Told before each value.
    """
    name, opener = next(iter(setup.backends.items()))
    base = replace(setup, bundles=setup.bundles[:1], backends={name: opener}, baseline=False)
    points = []
    for axis in axes or AXES:
        for value, run in _runs(base, axis):
            progress(Event(component=f"{axis} {value:g}", phase="measure"))
            points.append(_point(axis, value, run(), setup.request.steps))
    return points


def _runs(setup: Setup, axis: str) -> Iterator[tuple[float, Callable[[], Sequence[Result]]]]:
    request = replace(setup.request, steps=min(_SHORT, setup.request.steps))
    short = replace(setup, request=request)
    if axis == "first candidate":
        yield from _candidates(short)
        return
    for value in AXES[axis]:
        if axis == "image tokens":
            sized = _of_tokens(setup.bundles[0], request, int(value))
            if sized is None:
                continue
            changed = replace(short, request=sized)
        elif axis == "images":
            changed = replace(short, images=int(value))
        else:
            changed = replace(setup, request=replace(setup.request, steps=int(value)))
        yield value, partial(measure, changed)


def _of_tokens(bundle: Bundle, request: GenerationRequest, tokens: int) -> GenerationRequest | None:
    """A square picture of so many image tokens, where the model takes it."""
    if request.image_tokens(bundle) == tokens:
        return request
    side = round(tokens**0.5)
    height, width = (side * unit for unit in side_pixels(bundle.contract, bundle.geometry))
    sized = replace(request, height=height, width=width)
    try:
        return sized if sized.image_tokens(bundle) == tokens else None
    except InputError:
        return None


def _candidates(setup: Setup) -> Iterator[tuple[float, Callable[[], Sequence[Result]]]]:
    """Forked elsewhere, in PyTorch: where the fork lies is fixed in an exported graph."""
    bundle = setup.bundles[0]
    contract, model, guided = bundle.contract, load_original(setup), setup.request.guidance.name
    entries = [Entry(bundle=bundle, guidance=name, backend="torch") for name in (setup.own, guided)]

    def run(first: int) -> list[Result]:
        moved = replace(contract, blocks=tuple(first + i for i in range(len(contract.blocks))))
        engine = EagerEngine(fork(model, moved), moved.graph)
        prepared = [setup.prepared(entry, engine.device) for entry in entries]
        with torch.inference_mode():
            return race([forked(engine, replace(p, plan=replace(p.plan, contract=moved))) for p in prepared])

    for share in AXES["first candidate"]:
        first = min(round(share * contract.num_blocks), contract.num_blocks - len(contract.blocks))
        yield first, partial(run, first)


def _point(axis: str, value: float, results: Sequence[Result], steps: int) -> Point:
    cfg, emag = results
    steps = int(value) if axis == "steps" else steps
    ratio = emag.ratio(cfg, steps)
    return Point(
        axis=axis,
        value=value,
        ratio=ratio.value,
        low=ratio.low,
        high=ratio.high,
        row_blocks=emag.contender.row_blocks(steps) / cfg.contender.row_blocks(steps),
        seconds=emag.seconds(steps) / emag.contender.images,
        engine=emag.contender.engine,
    )
