"""Prompt accuracy of tiny-sd3 per guidance, through the exported graphs.

``python -m benchmarks.prompt_accuracy`` builds the bundles it needs, asks every guidance for the same random
scenes from the same seeds, and lets a rule-based checker judge the pictures.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.results import FOLDER, write_results
from emag_export.bundle import Bundle
from emag_export.cli.console import out, progress_bar, quiet_libraries, table
from emag_export.exporter.build import build
from emag_export.kinds import Variant
from emag_export.options import BuildOptions
from emag_export.runtime.guidance.rules import GUIDANCES
from emag_export.runtime.pipeline import Pipeline
from emag_export.runtime.request import GenerationRequest, default_request
from emag_export.tiny_sd3.captions import caption
from emag_export.tiny_sd3.checker import accuracy, check
from emag_export.tiny_sd3.evaluate import evaluation_scenes

_BATCH = 10
RESULTS = FOLDER / "prompt_accuracy.json"
_CASES = [(Variant.EMAG_Q, name) for name in GUIDANCES] + [
    (Variant.EMAG, "emag"),
    (Variant.EMAG, "emag-only"),
    (Variant.EMAG_I, "emag"),
]


def axes() -> dict[str, Any]:
    """What is varied."""
    return {"guidance": [f"{variant} {name}" for variant, name in _CASES]}


@click.command()
@click.option("--prompts", default=100, show_default=True, help="Scenes asked of every guidance.")
@click.option("--bundles", type=click.Path(path_type=Path), default=Path("out/bundles"), show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
def main(prompts: int, bundles: Path, output: Path) -> None:
    """Measure, print a table, and write the result."""
    quiet_libraries()
    scenes = evaluation_scenes(prompts)
    rows: list[dict[str, Any]] = []
    for variant in dict.fromkeys(variant for variant, _ in _CASES):
        bundle = build("tiny-sd3", bundles / variant, BuildOptions(variant=variant))
        with Pipeline.open(bundle) as pipeline:
            for name in [name for v, name in _CASES if v is variant]:
                requests = _requests(bundle, [caption(scene) for scene in scenes], name)
                pictures = _pictures(pipeline, requests, f"{variant} {name}")
                verdicts = [check(p, scene) for p, scene in zip(pictures, scenes, strict=True)]
                cost = pipeline.prepare(requests[:1]).plan.cost.relative_to_cfg
                rows.append(
                    {
                        "variant": "-" if not GUIDANCES[name].perturbed else str(variant),
                        "guidance": name,
                        "row_blocks_relative_to_cfg": round(cost, 3),
                        "accuracy": accuracy(verdicts),
                    }
                )
    _report(rows, prompts, output)


def _requests(bundle: Bundle, prompts: list[str], guidance: str) -> list[GenerationRequest]:
    base = default_request(bundle, "-")
    base = replace(base, guidance=replace(base.guidance, name=guidance))
    return [replace(base, prompt=prompt, seed=seed) for seed, prompt in enumerate(prompts)]


def _pictures(
    pipeline: Pipeline, requests: list[GenerationRequest], label: str
) -> list[np.ndarray[Any, Any]]:
    pictures: list[np.ndarray[Any, Any]] = []
    batches = range(0, len(requests), _BATCH)
    with progress_bar(label, len(batches)) as progress:
        for start in batches:
            prepared = pipeline.prepare(requests[start : start + _BATCH])
            *_, last = pipeline.denoise(prepared)
            pictures += list(pipeline.decode(last.latents))
            progress.advance(progress.task_ids[0])
    return pictures


def _report(rows: list[dict[str, Any]], prompts: int, output: Path) -> None:
    attributes = list(rows[0]["accuracy"])
    grid = table("variant", "guidance", ">× CFG", *(f">{name} %" for name in attributes))
    for row in rows:
        grid.add_row(
            row["variant"],
            row["guidance"],
            f"{row['row_blocks_relative_to_cfg']:.3f}",
            *(f"{100 * row['accuracy'][name]:.0f}" for name in attributes),
        )
    out.print(grid)
    command = f"python -m benchmarks.prompt_accuracy --prompts {prompts}"
    write_results(output, command=command, axes=axes(), prompts=prompts, rows=rows)
    out.print(str(output))


if __name__ == "__main__":
    main()
