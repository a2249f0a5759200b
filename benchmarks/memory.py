"""Peak resident memory of bundles on the host beside what ``emag_export.footprint`` predicts.

``python -m benchmarks.memory BUNDLE...``
"""

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import onnxruntime  # noqa: F401  libraries are no part of what is measured, so they come before
import torch
from diffusers import FlowMatchEulerDiscreteScheduler  # noqa: F401  likewise

from benchmarks.results import FOLDER, write_results
from emag_export.bench.memory import measure_call
from emag_export.bundle import DENOISER, Bundle, engine_graph_file
from emag_export.cli.console import out, progress_bar, table
from emag_export.engines.ort import OnnxRuntimeEngine, OrtOptions
from emag_export.footprint import footprint
from emag_export.runtime.loop import denoise
from emag_export.runtime.prepare import prepare
from emag_export.runtime.request import default_request
from emag_export.runtime.sampling.plan import Phase
from emag_export.runtime.sampling.state import RunState
from emag_export.runtime.text.encoders import random_encoder

RESULTS = FOLDER / "memory.json"
_STEPS = 8
"""Enough for two guided calls: in the second one onnxruntime lays its memory out anew."""


def _run(path: Path, images: int, pixels: int, threads: int) -> None:
    """Everything up to the second guided step."""
    bundle = Bundle(path)
    asked = replace(default_request(bundle, "a circle"), height=pixels, width=pixels, steps=_STEPS)
    requests = [replace(asked, seed=seed) for seed in range(images)]
    options = OrtOptions(threads=threads)
    with torch.inference_mode(), bundle.loading(DENOISER, "onnxruntime") as graph:
        engine = OnnxRuntimeEngine(graph, bundle.spec(DENOISER), options)
    with torch.inference_mode(), engine:
        ready = prepare(bundle, requests, random_encoder(bundle), engine.device)
        start = RunState.start(bundle.contract, ready.latents, ready.conditioning.given)
        guided = 0
        for step in denoise(engine, ready.plan, start, ready.conditioning):
            guided += step.plan.phase == Phase.GUIDE
            if guided == 2:
                break


def _measure(path: Path, images: int, pixels: int, threads: int) -> dict[str, Any]:
    bundle = Bundle(path)
    predicted = footprint(bundle, images=images, height=pixels, width=pixels)
    _, measured = measure_call(partial(_run, path, images, pixels, threads))
    return {
        "bundle": path.name,
        "variant": str(bundle.contract.variant),
        "fused": f"{DENOISER}/{engine_graph_file('onnxruntime')}" in bundle.files,
        **asdict(predicted),
        "predicted": predicted.total,
        "measured": measured.resident,
        "own": measured.own,
        "mapped": measured.mapped,
        "ratio": round(measured.resident / predicted.total, 3),
    }


@click.command()
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--pixels", "sides", type=int, multiple=True, default=(256, 512, 768), show_default=True)
@click.option("--images", "counts", type=int, multiple=True, default=(1, 2), show_default=True)
@click.option("--threads", type=int, default=0, help="Of onnxruntime; 0: one per core.")
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS)
def main(
    bundles: tuple[Path, ...], sides: tuple[int, ...], counts: tuple[int, ...], threads: int, output: Path
) -> None:
    """Measure every bundle at every size, each in a process of its own, print a table, write the result."""
    grid = [(path, images, pixels) for path in bundles for pixels in sides for images in counts]
    rows = []
    with progress_bar("measuring", len(grid)) as progress:
        for case in grid:
            rows.append(_measure(*case, threads))
            progress.update(progress.task_ids[0], advance=1)
    shown = table("bundle", "fused", ">pixels", ">images", ">measured MB", ">predicted MB", ">ratio")
    for row in rows:
        megabytes = (f"{row[name] / 1e6:.0f}" for name in ("measured", "predicted"))
        shown.add_row(
            row["bundle"],
            str(row["fused"]),
            str(row["height"]),
            str(row["images"]),
            *megabytes,
            f"{row['ratio']:.2f}",
        )
    out.print(shown)
    write_results(
        output,
        command=" ".join(["python -m benchmarks.memory", *map(str, bundles)]),
        axes={"bundle": [path.name for path in bundles], "pixels": list(sides), "images": list(counts)},
        unit="bytes",
        threads=threads,
        cases=rows,
    )
    out.print(str(output))


if __name__ == "__main__":
    main()
