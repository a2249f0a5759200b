"""What Triton takes and what sharing steps brings there: ``python -m benchmarks.serving.on_triton``.

The server is old and for tests alone, see :mod:`benchmarks.serving.triton_server`; two cores, three minutes.
"""

import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import psutil  # type: ignore[import-untyped]
from rich.console import Console

from benchmarks.results import FOLDER, write_results
from benchmarks.serving.traffic import STEPS
from benchmarks.serving.triton_server import Triton, png_of, prepare, running_triton
from benchmarks.targets import run_command
from emag_export.bundle import Bundle
from emag_export.engines.config import EngineConfig
from emag_export.serve.triton.export import export_repository

__all__ = ["MEMORY", "RESULTS", "ROWS", "axes", "main"]

RESULTS = FOLDER / "serving-triton.json"
_REQUESTS, _ROUNDS, _STARTS, _EQUAL_STEPS = 8, 5, 5, 20
_PROMPT = "a large red circle on a blue background"
ROWS = {
    "calls": f"calls for {_REQUESTS} requests of {_EQUAL_STEPS} steps ({_REQUESTS * _EQUAL_STEPS} alone)",
    "together": f"{_REQUESTS} requests of {', '.join(map(str, STEPS))} steps in turn, at once",
    "one_by_one": "the same, one after the other",
    "start": "start until it is ready",
}
"""What is measured several times, by the name in the results."""
MEMORY = {"server": "memory of the server's process", "model": "memory of the model's"}
"""Proportional set sizes, likewise."""
_SETS: tuple[Mapping[str, Any], ...] = (
    {},
    {"GUIDANCE": "cfg"},
    {"NEGATIVE_PROMPT": "blue"},
    {"EMAG_SCALE": 1.2},
)
"""Optional inputs; Triton itself batches requests with equal sets of them only."""


def axes() -> dict[str, Any]:
    """What is varied."""
    return {"requests": _REQUESTS, "rounds": _ROUNDS, "starts": _STARTS, "steps": [_EQUAL_STEPS, *STEPS]}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write the results file."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    bundle = Path(words[0]) if words else Path("out/bench/tiny")
    console = Console(highlight=False)
    run_command("build", "--model", "tiny-sd3", "-o", str(bundle))
    installed = prepare()
    starts: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder) / "repository"
        export_repository(Bundle(bundle), repository, EngineConfig(threads=1))
        for _ in range(_STARTS):
            with running_triton(installed, repository) as triton:
                starts.append(triton.start)
                console.print(f"ready after {triton.start:.1f} s")
        with running_triton(installed, repository) as triton:
            found: dict[str, list[float]] = {"calls": [], "together": [], "one_by_one": [], "start": starts}
            _ask(triton, ({"STEPS": 1},))
            for _ in range(_ROUNDS):
                for name, value in _round(triton).items():
                    found[name].append(value)
            memory = _memory(triton)
    for name, values in found.items():
        console.print(f"{name}: {min(values):.3g} to {max(values):.3g}, median {median(values):.3g}")
    write_results(
        RESULTS, command="python -m benchmarks.serving.on_triton", axes=axes(), found=found, memory=memory
    )
    return 0


def _round(triton: Triton) -> dict[str, float]:
    """Calls of requests of one length; seconds of requests of several, together and one by one."""
    before = triton.executions()
    _ask(triton, [{**_SETS[n % len(_SETS)], "STEPS": _EQUAL_STEPS} for n in range(_REQUESTS)])
    calls = triton.executions() - before
    mixed = [{"STEPS": STEPS[n % len(STEPS)]} for n in range(_REQUESTS)]
    together = _ask(triton, mixed)
    one_by_one = sum(_ask(triton, (one,)) for one in mixed)
    return {"calls": calls, "together": together, "one_by_one": one_by_one}


def _ask(triton: Triton, requests: Sequence[Mapping[str, Any]]) -> float:
    """Seconds until all are answered, asked at once."""
    began = time.perf_counter()
    with ThreadPoolExecutor(len(requests)) as pool:
        answers = [pool.submit(triton.ask, _PROMPT, SEED=n, **given) for n, given in enumerate(requests)]
        pictures = [png_of(answer.result().raise_for_status()) for answer in answers]
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)
    return time.perf_counter() - began


def _memory(triton: Triton) -> dict[str, float]:
    """Bytes of the server's process and of the model's, of which each has its own share of shared pages."""
    server = psutil.Process(triton.process.pid)
    stubs = [child for child in server.children(recursive=True) if "python_backend_stub" in child.name()]
    stubs = stubs or server.children(recursive=True)
    return {
        "server": server.memory_full_info().pss,
        "model": max(child.memory_full_info().pss for child in stubs),
    }


if __name__ == "__main__":
    sys.exit(main())
