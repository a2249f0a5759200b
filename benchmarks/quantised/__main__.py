"""What each scheme of quantisation does to guidance and pictures: ``python -m benchmarks.quantised``.

On tiny-sd3, whose float32 bundle is the truth: every step on the reference's own state (c, c - p, choices of
blocks), then whole pictures. Speed and memory of int8 on onnxruntime, on a model as deep as SD3-medium with
random weights. Sizes of engines are measured by ``python -m benchmarks.full_size``.
"""

import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import click
import numpy as np
from skimage.metrics import peak_signal_noise_ratio

from benchmarks.quantised.speed import SIDES, THREADS, measure_memory, measure_speed
from benchmarks.results import FOLDER, commit, load_results, processor_slug, write_results
from emag_export.api import BuildKeywords, build_options
from emag_export.bench.report import describe_machine
from emag_export.bundle import DENOISER, Bundle
from emag_export.calibration.measure import measure_ranges
from emag_export.engines.config import EngineConfig
from emag_export.engines.registry import open_backend
from emag_export.exporter.build import build
from emag_export.reference.check_bundle import check_bundle
from emag_export.runtime.pipeline import Pipeline
from emag_export.runtime.request import GenerationRequest, default_request
from emag_export.tiny_sd3.captions import caption
from emag_export.tiny_sd3.evaluate import evaluation_scenes

__all__ = ["CASES", "RESULTS", "SPEED", "axes", "main"]

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

SPEED = "speed"
"""What int8 saves, beside the cases."""
_MODEL, _BATCH = "sd3-narrow", 10


def axes() -> dict[str, Any]:
    """What is varied."""
    return {"case": list(CASES), "image_tokens": [side**2 for side in SIDES], "threads": list(THREADS)}


@click.command()
@click.argument("cases", nargs=-1, type=click.Choice([*CASES, SPEED]))
@click.option("--prompts", default=50, show_default=True, help="Pictures; a third of them step by step.")
@click.option("--bundles", type=click.Path(path_type=Path), default=Path("out/quantised"), show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
def main(cases: tuple[str, ...], prompts: int, bundles: Path, output: Path) -> None:
    """Measure CASES, or everything; each goes into the results file of this processor when it is done."""
    path = output / f"{processor_slug(describe_machine())}.json"
    known = load_results(path) if path.is_file() else {"cases": []}
    found: dict[str, Any] = {key: known[key] for key in known if key in ("cases", "emag_beside_cfg", "int8")}

    def keep(**more: Any) -> None:
        found.update(more)
        write_results(path, command="python -m benchmarks.quantised", axes=axes(), **found)

    asked = cases or (*CASES, SPEED)
    if SPEED in asked:
        narrow = {
            name: _built(_MODEL, bundles / f"{_MODEL}-{name}", components=(DENOISER,), weights_seed=0, **how)
            for name, how in (("float32", {}), ("int8", {"quantize": "int8"}))
        }
        keep(
            int8={"commit": commit(), "speed": list(measure_speed(narrow)), "memory": measure_memory(narrow)}
        )
    if asked == (SPEED,):
        return
    truth = _built("tiny-sd3", bundles / "tiny-sd3-float32")
    requests = _requests(truth, prompts)
    wanted = {name: _pictures(truth, requests, name) for name in ("emag", "cfg")}
    keep(emag_beside_cfg=_compared(wanted["emag"], wanted["cfg"]))
    for case in (case for case in CASES if case in asked):
        folder = bundles / f"tiny-sd3-{case.replace(' ', '')}"
        bundle = _built("tiny-sd3", folder, encoders=truth.path, **CASES[case])
        row = {"case": case, "commit": commit(), **_steps(bundle, requests[: prompts // 3])}
        row |= _compared(_pictures(bundle, requests, "emag"), wanted["emag"])
        rows = {**{other["case"]: other for other in found["cases"]}, case: row}
        keep(cases=[rows[name] for name in CASES if name in rows])
        click.echo(f"{case}: error of c - p {row['direction']['error']:.3f}")


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


if __name__ == "__main__":
    sys.exit(main())
