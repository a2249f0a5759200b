"""What int8 saves on a CPU: seconds of a guided step of one image, and memory.

In a module of its own, so that a process that is watched can import what it shall run.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from emag_export.bench.memory import measure_peak
from emag_export.bundle import DENOISER, Bundle
from emag_export.engines.ort import OnnxRuntimeEngine, OrtOptions
from emag_export.exporter.graph.examples import random_inputs

__all__ = ["SIDES", "THREADS", "measure_memory", "measure_speed"]

SIDES = (16, 32)
"""Image tokens along a side."""
THREADS = (1, 2)
_TEXT, _ROUNDS = 333, 15


def measure_memory(bundles: Mapping[str, Bundle]) -> dict[str, Any]:
    """Of a session alone, and of a session and one call, by name of a bundle."""
    return {
        name: {
            what: asdict(measure_peak(partial(_session, bundle.path, calls=calls)))
            for what, calls in (("session", 0), ("session and call", 1))
        }
        for name, bundle in bundles.items()
    }


@contextmanager
def _session(path: Path, *, calls: int) -> Iterator[torch.device]:
    """A session that has been called so often; open within the ``with``."""
    bundle = Bundle(path)
    with _engine(bundle, threads=1) as engine:
        for _ in range(calls):
            engine.run(random_inputs(bundle.contract.graph, _sizes(SIDES[0])))
        yield torch.device("cpu")


def _engine(bundle: Bundle, *, threads: int) -> OnnxRuntimeEngine:
    with bundle.loading(DENOISER, "onnxruntime") as graph:
        return OnnxRuntimeEngine(graph, bundle.contract.graph, OrtOptions(threads=threads))


def _sizes(side: int) -> dict[str, int]:
    return {"trunk_rows": 2, "rows": 3, "tracked": 1, "text": _TEXT, "h": side, "w": side}


def measure_speed(bundles: Mapping[str, Bundle]) -> Iterator[dict[str, Any]]:
    """A guided step of one image: both graphs in turn, ratios of medians."""
    for threads in THREADS:
        with ExitStack() as stack:
            engines = {
                name: stack.enter_context(_engine(bundle, threads=threads))
                for name, bundle in bundles.items()
            }
            for side in SIDES:
                spec = bundles["int8"].contract.graph
                feeds = {**random_inputs(spec, _sizes(side)), "branch_rows": torch.tensor([0, 1, 1])}
                seconds: dict[str, list[float]] = {name: [] for name in engines}
                for number in range(_ROUNDS + 1):
                    for name, engine in engines.items():
                        began = time.perf_counter()
                        engine.run(feeds)
                        if number:  # the first call packs weights
                            seconds[name].append(time.perf_counter() - began)
                medians = {name: median(found) for name, found in seconds.items()}
                ratio = medians["int8"] / medians["float32"]
                yield {"threads": threads, "image_tokens": side**2, "seconds": medians, "ratio": ratio}
