"""How long a call takes by its number of images, measured once and kept beside the bundle.

From it follows how many images may share a call: never more than pays.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

from emag_export.bundle import Bundle
from emag_export.engines.protocol import Engine
from emag_export.errors import BundleError, InputError
from emag_export.hashing import hash_json
from emag_export.progress import Event, Progress, silent
from emag_export.records import FORMAT_VERSION, dump_record, read_record
from emag_export.runtime.batching.slots import Slots
from emag_export.runtime.device import device_name
from emag_export.runtime.prepare import Prepared
from emag_export.runtime.sampling.call import ImageStep
from emag_export.runtime.sampling.plan import Phase, Plan, PlannedStep

__all__ = [
    "COUNTS",
    "FOLDER",
    "CallTime",
    "CallTimes",
    "measure_call_times",
    "read_call_times",
    "save_call_times",
    "stored_call_times",
]

FOLDER = "call-times"
"""Beside the graphs of a bundle; not part of what its manifest lists."""
COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
"""Images per call that are tried."""
_PAYS = 1.03
"""A larger call must give that much more pictures a second to be worth its longer steps."""
_REPEATS = 5


@dataclass(frozen=True, kw_only=True)
class CallTime:
    """One row of the table."""

    images: int
    phase: Phase
    """Of all of them."""
    seconds: float
    """Median of a step: engine, guidance and sampler."""


@dataclass(frozen=True, kw_only=True)
class CallTimes:
    """The table of one engine at one size of picture."""

    format_version: int = FORMAT_VERSION
    bundle: str
    """Key of the bundle."""
    engine: str
    """Backend and device."""
    machine: str
    threads: int
    """CPU threads of the engine; 0 is all."""
    height: int
    """Pixels."""
    width: int
    times: tuple[CallTime, ...]

    def __post_init__(self) -> None:
        if not all(row.images > 0 and row.seconds > 0 for row in self.times):
            raise InputError("a table of call times has a row without images or seconds; measure it again")
        for phase in (Phase.PLAIN, Phase.GUIDE):
            if 1 not in self._column(phase):
                raise InputError(f"a table of call times needs the time of one {phase} image; measure it")

    def seconds(self, images: int, guided: int = 0) -> float:
        """Seconds of a call, between and beyond the measured numbers along straight lines.

        Args:
            images: In the call, at least one.
            guided: How many of them have a perturbed row.
        """
        plain, guide = (_interpolated(self._column(phase), images) for phase in (Phase.PLAIN, Phase.GUIDE))
        return plain + (guide - plain) * guided / images

    def run_seconds(self, plan: Plan, images: int = 1) -> float:
        """Seconds of a whole run with so many images of the same plan in every call."""
        return sum(self.seconds(images, images * (step.phase == Phase.GUIDE)) for step in plan.steps)

    def most_that_pay(self, plan: Plan) -> int:
        """The fewest images a call with which nearly as many pictures a second come as with any number.

        Args:
            plan: Of a typical request; it says how many steps have a perturbed row.
        """
        counts = sorted(self._column(Phase.PLAIN).keys() & self._column(Phase.GUIDE).keys())
        rate = {count: count / self.run_seconds(plan, count) for count in counts}
        best = counts[0]
        for count in counts[1:]:
            if rate[count] >= _PAYS * rate[best]:
                best = count
        return best

    def _column(self, phase: Phase) -> dict[int, float]:
        return {row.images: row.seconds for row in self.times if row.phase == phase}


def _interpolated(column: dict[int, float], images: int) -> float:
    counts = sorted(column)
    if len(counts) == 1:
        return column[counts[0]] * images / counts[0]
    right = next((i for i, count in enumerate(counts) if count >= images), len(counts) - 1)
    low, high = counts[max(right - 1, 0)], counts[max(right, 1)]
    return column[low] + (column[high] - column[low]) * (images - low) / (high - low)


def measure_call_times(
    bundle: Bundle,
    engine: Engine,
    prepared: Prepared,
    *,
    most: int = COUNTS[-1],
    threads: int = 0,
    progress: Progress = silent,
) -> CallTimes:
    """Time calls of more and more images, until more images bring no more pictures a second.

    Args:
        bundle: Of the graph.
        engine: Runs it; nobody else may use it meanwhile.
        prepared: One image; its size is what is measured.
        most: Images to try at most.
        threads: CPU threads of the engine, for the record.
        progress: Told of every number of images.
    """
    steps = {
        Phase.PLAIN: _step_of(prepared.plan, Phase.PLAIN),
        Phase.GUIDE: _step_of(prepared.plan, Phase.GUIDE),
    }
    rows: list[CallTime] = []
    rates: list[float] = []
    for images in [count for count in COUNTS if count <= most]:
        progress(Event(component="calls", phase=f"time {images} images"))
        slots = Slots(prepared.plan.contract, prepared.latents, prepared.conditioning, images)
        for _ in range(images):
            slots.join(prepared.latents, prepared.conditioning)
        noise = None if prepared.noise is None else torch.cat([prepared.latents] * images)
        for phase, step in steps.items():
            call = [ImageStep(step=step, guidance=prepared.plan.guidance)] * images
            seconds = _median_seconds(lambda: slots.step(engine, call, noise), engine.device)  # noqa: B023
            rows.append(CallTime(images=images, phase=phase, seconds=seconds))
        rates.append(images / (rows[-1].seconds + rows[-2].seconds))
        if len(rates) > 2 and max(rates[-2:]) < _PAYS * max(rates[:-2]):
            break
    request = prepared.requests[0]
    return CallTimes(
        bundle=bundle.key,
        engine=engine.name,
        machine=device_name(engine.device),
        threads=threads,
        height=request.height,
        width=request.width,
        times=tuple(rows),
    )


def _step_of(plan: Plan, phase: Phase) -> PlannedStep:
    """A step of that phase, or the first one where the plan has none: the same rows in another plan."""
    return next((step for step in plan.steps if step.phase == phase), plan.steps[0])


def _median_seconds(call: Callable[[], object], device: torch.device) -> float:
    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    found = []
    # Two go uncounted: buffers are made in the first, and a GPU captures in the second.
    for _ in range(_REPEATS + 2):
        synchronize()
        started = perf_counter()
        call()
        synchronize()
        found.append(perf_counter() - started)
    return median(found[2:])


def stored_call_times(
    bundle: Bundle, engine: Engine, size: tuple[int, int], threads: int
) -> tuple[Path, CallTimes | None]:
    """Where a table is kept, and the table if it is there and fits.

    Args:
        bundle: Of the graph.
        engine: That will run.
        size: Height and width, pixels.
        threads: CPU threads of the engine.
    """
    machine = device_name(engine.device)
    name = hash_json([bundle.key, engine.name, machine, threads, size])[:16]
    path = bundle.path / FOLDER / f"{name}.json"
    if not path.is_file():
        return path, None
    try:
        return path, read_call_times(path)
    except BundleError:  # damaged or of another version: it is only a measurement, and is made again
        return path, None


def read_call_times(path: Path) -> CallTimes:
    """A table that was kept, or written by hand for a machine that is not here.

    Raises:
        InputError: If the file cannot be read.
        BundleError: If it is damaged.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    return read_record(CallTimes, text, name=str(path), remedy="delete it, it is measured again")


def save_call_times(path: Path, table: CallTimes) -> bool:
    """Keep a table; False where the folder cannot be written, as on a read-only mount."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(exist_ok=True)
        partial.write_text(dump_record(table), "utf-8")
        partial.replace(path)
    except OSError:
        return False
    return True
