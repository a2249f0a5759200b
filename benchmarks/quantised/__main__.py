"""What each scheme of quantisation does to guidance and pictures: ``python -m benchmarks.quantised``.

On tiny-sd3, whose float32 bundle is the truth: every step on the reference's own state (c, c - p, choices of
blocks), then whole pictures. Speed and memory of int8 on onnxruntime, on a model as deep as SD3-medium with
random weights. Sizes of engines are measured by ``python -m benchmarks.full_size``.
"""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any

import click
import numpy as np
import torch
from skimage.metrics import peak_signal_noise_ratio

from benchmarks.results import FOLDER, processor_slug, write_results
from emag_export.api import BuildKeywords, build_options
from emag_export.bench.memory import measure_peak
from emag_export.bench.report import describe_machine
from emag_export.bundle import DENOISER, Bundle
from emag_export.calibration.measure import measure_ranges
from emag_export.engines.config import EngineConfig
from emag_export.engines.ort import OnnxRuntimeEngine, OrtOptions
from emag_export.engines.registry import open_backend
from emag_export.exporter.build import build
from emag_export.exporter.graph.examples import random_inputs
from emag_export.reference.check_bundle import check_bundle
from emag_export.runtime.pipeline import Pipeline
from emag_export.runtime.request import GenerationRequest, default_request
from emag_export.tiny_sd3.captions import caption
from emag_export.tiny_sd3.evaluate import evaluation_scenes

__all__ = ["CASES", "RESULTS", "SIDES", "THREADS", "axes", "main"]

RESULTS = FOLDER / "quantised"

CASES: Mapping[str, BuildKeywords] = MappingProxyType(
    {
        "float16": {"precision": "fp16"},
        "w8": {"precision": "fp16", "quantize": "w8"},
        "fp8": {"precision": "fp16", "quantize": "fp8"},
        "fp8 + attention": {"precision": "fp16", "quantize": "fp8", "fp8_attention": True},
        "int8": {"quantize": "int8"},
    }
)
"""What is shown, to how it is built."""

SIDES = (16, 32)
"""Image tokens along a side."""
THREADS = (1, 2)
_MODEL, _TEXT, _ROUNDS, _BATCH = "sd3-narrow", 333, 15, 10


def axes() -> dict[str, Any]:
    """What is varied."""
    return {"case": list(CASES), "image_tokens": [side**2 for side in SIDES], "threads": list(THREADS)}


@click.command()
@click.option("--prompts", default=50, show_default=True, help="Pictures; a third of them step by step.")
@click.option("--bundles", type=click.Path(path_type=Path), default=Path("out/quantised"), show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
def main(prompts: int, bundles: Path, output: Path) -> None:
    """Build what is missing, measure, and write the results file of this processor."""
    truth = _built("tiny-sd3", bundles / "tiny-sd3-float32")
    requests = _requests(truth, prompts)
    wanted = {name: _pictures(truth, requests, name) for name in ("emag", "cfg")}
    cases = []
    for case, options in CASES.items():
        bundle = _built(
            "tiny-sd3", bundles / f"tiny-sd3-{case.replace(' ', '')}", encoders=truth.path, **options
        )
        cases.append({"case": case, **_steps(bundle, requests[: prompts // 3])})
        cases[-1] |= _compared(_pictures(bundle, requests, "emag"), wanted["emag"])
        click.echo(cases[-1])
    alone = _compared(wanted["emag"], wanted["cfg"])
    narrow = {
        name: _built(_MODEL, bundles / f"{_MODEL}-{name}", components=(DENOISER,), weights_seed=0, **options)
        for name, options in (("float32", {}), ("int8", {"quantize": "int8"}))
    }
    name = processor_slug(describe_machine())
    write_results(
        output / f"{name}.json",
        command="python -m benchmarks.quantised",
        axes=axes(),
        cases=cases,
        emag_beside_cfg=alone,
        speed=list(_speed(narrow)),
        memory={
            case: asdict(measure_peak(partial(_session, bundle.path))) for case, bundle in narrow.items()
        },
    )


def _built(model: str, folder: Path, **options: Any) -> Bundle:
    return build(model, folder, build_options(**options), overwrite=True, calibrate=measure_ranges)


def _requests(bundle: Bundle, count: int) -> list[GenerationRequest]:
    scenes = evaluation_scenes(count)
    return [replace(default_request(bundle, caption(scene)), seed=i) for i, scene in enumerate(scenes)]


def _steps(bundle: Bundle, requests: list[GenerationRequest]) -> dict[str, Any]:
    """Teacher-forced, all in one batch; with PyTorch's own errors in half precision."""
    found = check_bundle(bundle, open_backend(EngineConfig(backend="onnxruntime"), bundle), requests)
    assert found.direction is not None, "the default guidance of this model is emag"
    return {
        "bytes": sum(r.bytes for name, r in bundle.files.items() if name.startswith(f"{DENOISER}/model")),
        "passed": found.passed,
        "failures": found.failures(),
        "choices": found.agreeing,
        "direction": asdict(found.direction),
        "by_step": {s.index: s.direction.error for s in found.steps if s.direction is not None},
        "floors": {name: asdict(floor) for name, floor in found.direction_floors.items()},
        "floors_by_step": {
            name: {s.index: s.direction_floors[name].error for s in found.steps if name in s.direction_floors}
            for name in found.direction_floors
        },
    }


def _pictures(bundle: Bundle, requests: list[GenerationRequest], guidance: str) -> list[Any]:
    asked = [replace(request, guidance=replace(request.guidance, name=guidance)) for request in requests]
    pictures: list[Any] = []
    with Pipeline.open(bundle) as pipeline:
        for start in range(0, len(asked), _BATCH):
            *_, last = pipeline.denoise(pipeline.prepare(asked[start : start + _BATCH]))
            pictures += list(pipeline.decode(last.latents))
    return pictures


def _compared(got: list[Any], wanted: list[Any]) -> dict[str, Any]:
    psnr = [float(peak_signal_noise_ratio(*pair, data_range=255)) for pair in zip(wanted, got, strict=True)]
    tenth, half = np.quantile(psnr, (0.1, 0.5))
    return {"psnr": {"median": float(half), "lowest_tenth": float(tenth)}, "pictures": len(psnr)}


@contextmanager
def _session(path: Path) -> Iterator[torch.device]:
    """One call, so that weights are packed; open within the ``with``."""
    bundle = Bundle(path)
    with _engine(bundle, threads=1) as engine:
        engine.run(random_inputs(bundle.contract.graph, _sizes(SIDES[0])))
        yield torch.device("cpu")


def _engine(bundle: Bundle, *, threads: int) -> OnnxRuntimeEngine:
    with bundle.loading(DENOISER, "onnxruntime") as graph:
        return OnnxRuntimeEngine(graph, bundle.contract.graph, OrtOptions(threads=threads))


def _sizes(side: int) -> dict[str, int]:
    return {"trunk_rows": 2, "rows": 3, "tracked": 1, "text": _TEXT, "h": side, "w": side}


def _speed(bundles: Mapping[str, Bundle]) -> Iterator[dict[str, Any]]:
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


if __name__ == "__main__":
    sys.exit(main())
