"""A measurement written down: plain data for programs, which the table and the plots are made of."""

import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch

from emag_export.bench.contender import PYTORCH
from emag_export.bench.memory import Peak
from emag_export.bench.race import Ratio, Result
from emag_export.bench.session import Setup
from emag_export.runtime.device import processor_name
from emag_export.runtime.sampling.plan import Phase

__all__ = ["describe_machine", "describe_results", "describe_setup"]

_PACKAGES = (
    "emag-export",
    "torch",
    "diffusers",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx",
    "polygraphy",
)


def describe_machine() -> dict[str, Any]:
    """Processor, memory, GPU, versions and command: what a number is worth nothing without."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": processor_name(),
        "cores": psutil.cpu_count(logical=False),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpu": gpu,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": dict(_versions()),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def _versions() -> Iterable[tuple[str, str]]:
    for package in _PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            continue


def describe_setup(setup: Setup, rounds: int) -> dict[str, Any]:
    """What was run."""
    first, request = setup.bundles[0], setup.request
    contract = first.contract
    return {
        "model": first.provenance.model,
        "own_guidance": setup.own,
        "random_weights": first.provenance.seed is not None,
        "blocks": contract.num_blocks,
        "width": contract.heads * contract.head_dim,
        "candidates": list(contract.blocks),
        "precision": first.described_precision,
        "height": request.height,
        "width_pixels": request.width,
        "image_tokens": request.image_tokens(first),
        "text_tokens": first.geometry.text.usual,
        "images": setup.images,
        "steps": request.steps,
        "rounds": rounds,
    }


def describe_results(
    results: Sequence[Result], peaks: Sequence[Peak] | None = None, *, own: str = "cfg"
) -> list[dict[str, Any]]:
    """One entry per contender.

    Args:
        results: Of :func:`~emag_export.bench.session.measure`.
        peaks: Of :func:`~emag_export.bench.session.measure_peaks`, in the same order.
        own: The model's own guidance, which ``to_cfg`` and ``to_pytorch_cfg`` compare with.
    """
    rows = []
    for index, result in enumerate(results):
        contender = result.contender
        same = _find(results, own, contender.engine)
        row: dict[str, Any] = {
            "method": contender.method,
            "engine": contender.engine,
            "seconds_per_image": result.seconds() / contender.images,
            "row_blocks": contender.row_blocks(),
            "to_cfg": _compared(result, same),
            "to_pytorch_cfg": _compared(result, _find(results, own, PYTORCH)),
            "to_two_pass": _compared(result, _find(results, f"two-pass {contender.method}", PYTORCH)),
            "phases": _phases(result),
            "outside_engine": result.outside_engine,
        }
        if peaks is not None:
            row["peak_memory"] = _peak(peaks[index])
        rows.append(row)
    return rows


def _peak(peak: Peak) -> dict[str, int | None]:
    """Bytes; of resident host memory the sum and both kinds of it."""
    return {
        "host": peak.host.resident,
        "host_own": peak.host.own,
        "host_mapped": peak.host.mapped,
        "device": peak.device,
    }


def _find(results: Sequence[Result], method: str, engine: str) -> Result | None:
    for result in results:
        if (result.contender.method, result.contender.engine) == (method, engine):
            return result
    return None


def _compared(result: Result, other: Result | None) -> Mapping[str, float] | None:
    """Measured ratio, its interval, and what the row-blocks predict."""
    if other is None or other is result:
        return None
    ratio: Ratio = result.ratio(other)
    predicted = result.contender.row_blocks() / other.contender.row_blocks()
    return {"ratio": ratio.value, "low": ratio.low, "high": ratio.high, "row_blocks": predicted}


def _phases(result: Result) -> dict[str, Any]:
    """Of every phase how many steps a run has, and milliseconds: median and the middle half."""
    phases = {}
    for phase, seconds in result.phase_seconds().items():
        low, _, high = quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
        phases[str(phase)] = {
            "steps": result.contender.phases().count(Phase(phase)),
            "ms": 1e3 * median(seconds),
            "low": 1e3 * low,
            "high": 1e3 * high,
        }
    return phases
