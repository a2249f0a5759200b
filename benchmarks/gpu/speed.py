"""Time one engine on one bundle: ``python -m benchmarks.gpu.speed BUNDLE --backend onnxruntime``.

Prints one JSON line per guidance as soon as it is measured: CFG and EMAG on a bundle of ``emag-q``, EMAG
alone on any other. Without ``--backend`` the unmodified diffusers model runs, EMAG as released: two passes.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.clock import mark, seconds_between
from benchmarks.gpu.flops import data_sheet_tflops, row_flops, run_flops
from emag_export.bench.contender import Contender, forked, two_pass
from emag_export.bench.race import WARM_UP_ROUNDS
from emag_export.bench.session import Entry, Setup, load_original
from emag_export.bench.timing import wait_for
from emag_export.bundle import DENOISER, Bundle
from emag_export.cli.console import quiet_libraries
from emag_export.engines.config import EngineConfig
from emag_export.engines.protocol import Engine
from emag_export.engines.registry import BACKENDS, open_backend
from emag_export.errors import EmagError
from emag_export.kinds import Variant
from emag_export.reference.two_pass import ReferenceStep, two_pass_denoise
from emag_export.runtime.loop import DenoiseStep, denoise
from emag_export.runtime.prepare import Prepared
from emag_export.runtime.request import default_request
from emag_export.runtime.sampling.pool import StatePool
from emag_export.sizes import call_sizes

__all__ = ["TimedRun", "guidances_of", "measure", "setup_of", "time_run"]

Step = DenoiseStep | ReferenceStep
Subject = Callable[[Prepared], tuple[Contender, Callable[[], Iterator[Step]]]]
"""What was prepared to its description, and to a function that starts a run of it."""


def guidances_of(variant: Variant) -> tuple[str, ...]:
    """What is measured on a bundle: CFG once, on the variant whose graph is the cheapest."""
    return ("cfg", "emag") if variant == Variant.EMAG_Q else ("emag",)


@dataclass(frozen=True, kw_only=True)
class TimedRun:
    """One run, timed where its steps end."""

    phases: tuple[str, ...]
    seconds: tuple[float, ...]
    """Of every step, on the device's clock."""
    host_seconds: float
    """Until the host had asked for everything; much less than the sum of ``seconds`` where it never waits."""
    latents: Tensor


def time_run(steps: Iterator[Step], device: torch.device) -> TimedRun:
    """Run steps and time them, without ever waiting between two of them.

    On a GPU an event is put behind every step, and all are read after the last one.

    Args:
        steps: Of a whole run.
        device: Where it runs.
    """
    wait_for(device)
    began = time.perf_counter()
    marks, phases, latents = [mark(device)], [], None
    for step in steps:
        marks.append(mark(device))
        phases.append(str(step.plan.phase))
        latents = step.latents
    host = time.perf_counter() - began
    wait_for(device)
    assert latents is not None, "a run has steps"
    return TimedRun(
        phases=tuple(phases),
        seconds=tuple(seconds_between(*pair) for pair in pairwise(marks)),
        host_seconds=host,
        latents=latents,
    )


def setup_of(bundle: Bundle, options: argparse.Namespace) -> Setup:
    """One bundle and one backend, or none for the diffusers model."""
    request = replace(default_request(bundle, "a picture"), steps=options.steps)
    if options.pixels is not None:
        request = replace(request, height=options.pixels, width=options.pixels)
    backends = {}
    if options.backend is not None:
        engine = EngineConfig(backend=options.backend, device=options.device)
        backends[options.backend] = partial(open_backend, engine)
    return Setup(
        bundles=(bundle,),
        backends=backends,
        request=request,
        images=options.images,
        baseline_device=options.device,
    )


def measure(setup: Setup, *, runs: int, free: int | None) -> Iterator[dict[str, Any]]:
    """Open, warm up, time; one result per guidance, while everything is still open.

    Args:
        setup: Of :func:`setup_of`.
        runs: Whole runs of each that count.
        free: Bytes that were free on the GPU before; None measures no device memory.
    """
    (bundle,) = setup.bundles
    with ExitStack() as stack:
        began = time.perf_counter()
        subject, device = _open(setup, stack)
        wait_for(device)
        opened = time.perf_counter() - began
        for guidance in guidances_of(bundle.contract.variant):
            entry = Entry(bundle=bundle, guidance=guidance, backend=next(iter(setup.backends), None))
            with torch.inference_mode():
                contender, start = subject(setup.prepared(entry, device))
                timed = [time_run(start(), device) for _ in range(WARM_UP_ROUNDS + runs)]
            yield {
                "guidance": guidance,
                "method": contender.method,
                "engine": contender.engine,
                "row_blocks": contender.row_blocks(),
                "open_seconds": opened,
                "warm_up_seconds": [sum(run.seconds) for run in timed[:WARM_UP_ROUNDS]],
                **_times(timed[WARM_UP_ROUNDS:], setup.images),
                **_operations(setup, contender, timed[WARM_UP_ROUNDS:]),
                "finite": bool(timed[-1].latents.isfinite().all()),
                "device_memory": None if free is None else _device_memory(device, free),
            }


def _open(setup: Setup, stack: ExitStack) -> tuple[Subject, torch.device]:
    if not setup.backends:
        device = torch.device(setup.baseline_device)
        model = load_original(setup).to(device)
        return lambda prepared: (two_pass(model, prepared), partial(_passes, model, prepared)), device
    (bundle,), (opener,) = setup.bundles, setup.backends.values()
    engine = stack.enter_context(opener(bundle)(bundle, DENOISER))
    pool = StatePool()
    return lambda prepared: (forked(engine, prepared), partial(_calls, engine, pool, prepared)), engine.device


def _passes(model: Any, prepared: Prepared) -> Iterator[Step]:
    return two_pass_denoise(
        model,
        prepared.plan,
        prepared.latents,
        prepared.conditioning,
        anneal=prepared.anneal,
        noise=prepared.noise,
    )


def _calls(engine: Engine, pool: StatePool, prepared: Prepared) -> Iterator[Step]:
    """Our loop on averages that lie where those of the last run lay, so that captured calls are replayed."""
    plan, given = prepared.plan, prepared.conditioning
    with pool.lend(plan.contract, prepared.latents, given.given) as start:
        yield from denoise(engine, plan, start, given, anneal=prepared.anneal, noise=prepared.noise)


def _times(timed: Sequence[TimedRun], images: int) -> dict[str, Any]:
    totals = [sum(run.seconds) for run in timed]
    by_phase: dict[str, list[float]] = {}
    for run in timed:
        for phase, seconds in zip(run.phases, run.seconds, strict=True):
            by_phase.setdefault(phase, []).append(1e3 * seconds)
    return {
        "seconds_per_image": median(totals) / images,
        "seconds_per_run": median(totals),
        "runs": totals,
        "host_seconds": median(run.host_seconds for run in timed),
        "phases": {phase: _phase(ms, len(timed)) for phase, ms in by_phase.items()},
    }


def _phase(ms: Sequence[float], runs: int) -> Mapping[str, float]:
    """Of a phase how many steps a run has, and milliseconds: median and the middle half."""
    low, _, high = quantiles(ms, n=4, method="inclusive") if len(ms) > 1 else list(ms) * 3
    return {"steps": len(ms) // runs, "ms": median(ms), "low": low, "high": high}


def _operations(setup: Setup, contender: Contender, timed: Sequence[TimedRun]) -> dict[str, Any]:
    """TFLOP of one image, how many a second, and the share of what the data sheet promises."""
    bundle, request = setup.bundles[0], setup.request
    sizes = call_sizes(bundle.contract, bundle.geometry, images=1, height=request.height, width=request.width)
    row = row_flops(bundle.family, bundle.config(DENOISER), sizes)
    tflop = run_flops(contender, row) / 1e12
    rate = tflop * setup.images / median(sum(run.seconds) for run in timed)
    on_gpu = contender.device.type == "cuda"
    device = torch.cuda.get_device_name(contender.device) if on_gpu else "cpu"
    limit = data_sheet_tflops(device, contender.plan.contract.precision)
    return {
        "tflop_per_row_and_step": row / 1e12,
        "tflop_per_image": tflop,
        "tflop_per_second": rate,
        "of_data_sheet": None if limit is None else rate / limit,
    }


def _device_memory(device: torch.device, free: int) -> dict[str, int]:
    """Bytes in use now and free before. The second guidance of a bundle finds the graphs of the first."""
    return {
        "in_use": free - torch.cuda.mem_get_info(device)[0],
        "torch_allocated": torch.cuda.max_memory_allocated(device),
        "torch_reserved": torch.cuda.max_memory_reserved(device),
    }


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--backend", choices=list(BACKENDS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--images", type=int, default=1, help="Pictures per call.")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--pixels", type=int, help="Height and width; default: the bundle's own.")
    options = parser.parse_args()
    quiet_libraries()
    free = None
    if options.device.startswith("cuda"):
        torch.zeros(1, device=options.device)  # PyTorch's context, which is no part of what is measured
        torch.cuda.synchronize(options.device)
        free = torch.cuda.mem_get_info(options.device)[0]
    try:
        for result in measure(setup_of(Bundle(options.bundle), options), runs=options.runs, free=free):
            print(json.dumps(result), flush=True)
    except EmagError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
