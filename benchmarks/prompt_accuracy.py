"""Prompt accuracy of the embedded models per guidance, through the exported graphs.

``python -m benchmarks.prompt_accuracy`` builds the bundles it needs, asks every guidance for the same random
scenes, or the same classes, from the same seeds, and lets a rule-based checker judge the pictures.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.results import FOLDER, write_results
from emag_export.bundle import Bundle
from emag_export.cli.console import out, progress_bar, quiet_libraries, table
from emag_export.exporter.build import build
from emag_export.kinds import KINDS, Variant
from emag_export.options import BuildOptions
from emag_export.runtime.guidance.rules import GUIDANCES, Guidance
from emag_export.runtime.pipeline import Pipeline
from emag_export.runtime.request import GenerationRequest, default_request
from emag_export.tiny_dit.checker import check_class, class_accuracy
from emag_export.tiny_dit.classes import CLASSES, class_names
from emag_export.tiny_sd3.captions import caption
from emag_export.tiny_sd3.checker import accuracy, check
from emag_export.tiny_sd3.evaluate import evaluation_scenes

_BATCH = 10
Picture = np.ndarray[Any, Any]
Judge = Callable[[Sequence[Picture]], dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """An embedded model and what it is asked for.

    Attributes:
        cases: Variant of the bundle, guidance, guidance scale (None is the model's own).
        questions: For a number of prompts, the prompts and what judges the pictures, in order.
    """

    cases: tuple[tuple[Variant, str, float | None], ...]
    questions: Callable[[int], tuple[list[str], Judge]]


def _scenes(count: int) -> tuple[list[str], Judge]:
    scenes = evaluation_scenes(count)
    return [caption(scene) for scene in scenes], lambda pictures: accuracy(
        [check(*pair) for pair in zip(pictures, scenes, strict=True)]
    )


def _classes(count: int) -> tuple[list[str], Judge]:
    labels = [number % len(CLASSES) for number in range(count)]
    prompts = [class_names(label)[0] for label in labels]
    return prompts, lambda pictures: class_accuracy(
        check_class(*pair) for pair in zip(pictures, labels, strict=True)
    )


_STEERED = [name for name in GUIDANCES if name != "none"]
"""Without guidance stands ``cfg`` with w = 1, whose unconditional row is sent and changes nothing."""

SUBJECTS: Mapping[str, Subject] = {
    "tiny-sd3": Subject(
        cases=(
            (Variant.EMAG_Q, "cfg", 1.0),
            *((Variant.EMAG_Q, name, None) for name in _STEERED),
            (Variant.EMAG, "emag", None),
            (Variant.EMAG, "emag-only", None),
            (Variant.EMAG_I, "emag", None),
        ),
        questions=_scenes,
    ),
    "tiny-dit": Subject(
        cases=(
            (Variant.EMAG_Q, "cfg", 1.0),
            *((Variant.EMAG_Q, name, None) for name in _STEERED if not GUIDANCES[name].cads),
            (Variant.EMAG, "emag", None),
            (Variant.EMAG, "emag-only", None),
            *((kind, "emag", None) for kind, facts in KINDS.items() if facts.averages is None),
        ),
        questions=_classes,
    ),
}


def results_file(model: str) -> Path:
    """Where the figures of a model are kept."""
    return FOLDER / "prompt_accuracy" / f"{model}.json"


def axes(model: str) -> dict[str, Any]:
    """What is varied."""
    return {"guidance": [_label(*case) for case in SUBJECTS[model].cases]}


def _label(variant: Variant, guidance: str, scale: float | None) -> str:
    return f"{variant} {guidance}" + ("" if scale is None else f" {scale:g}")


@click.command()
@click.option("--model", type=click.Choice(list(SUBJECTS)), default="tiny-sd3", show_default=True)
@click.option("--prompts", default=192, show_default=True, help="Prompts asked of every guidance.")
@click.option("--bundles", type=click.Path(path_type=Path), default=Path("out/bundles"), show_default=True)
@click.option("--output", type=click.Path(path_type=Path), help="Default: the folder of results.")
def main(model: str, prompts: int, bundles: Path, output: Path | None) -> None:
    """Measure, print a table, and write the result."""
    quiet_libraries()
    subject = SUBJECTS[model]
    texts, judge = subject.questions(prompts)
    rows: list[dict[str, Any]] = []
    for variant in dict.fromkeys(case[0] for case in subject.cases):
        bundle = build(model, bundles / f"{model}-{variant}", BuildOptions(variant=variant))
        with Pipeline.open(bundle) as pipeline:
            for case in [case for case in subject.cases if case[0] is variant]:
                requests = _requests(bundle, texts, *case[1:])
                pictures = _pictures(pipeline, requests, _label(*case))
                cost = pipeline.prepare(requests[:1]).plan.cost.relative_to_cfg
                rows.append(
                    {
                        "variant": "-" if not GUIDANCES[case[1]].perturbed else str(variant),
                        "guidance": "none" if case[2] == 1 else case[1],
                        "row_blocks_relative_to_cfg": round(cost, 3),
                        "accuracy": judge(pictures),
                    }
                )
    _report(model, rows, prompts, output or results_file(model))


def _requests(
    bundle: Bundle, prompts: list[str], guidance: str, scale: float | None
) -> list[GenerationRequest]:
    base = default_request(bundle, "-")
    chosen: Guidance = replace(base.guidance, name=guidance)
    chosen = chosen if scale is None else replace(chosen, scale=scale)
    base = replace(base, guidance=chosen)
    return [replace(base, prompt=prompt, seed=seed) for seed, prompt in enumerate(prompts)]


def _pictures(pipeline: Pipeline, requests: list[GenerationRequest], label: str) -> list[Picture]:
    pictures: list[Picture] = []
    batches = range(0, len(requests), _BATCH)
    with progress_bar(label, len(batches)) as progress:
        for start in batches:
            prepared = pipeline.prepare(requests[start : start + _BATCH])
            *_, last = pipeline.denoise(prepared)
            pictures += list(pipeline.decode(last.latents))
            progress.advance(progress.task_ids[0])
    return pictures


def _report(model: str, rows: list[dict[str, Any]], prompts: int, output: Path) -> None:
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
    command = f"python -m benchmarks.prompt_accuracy --model {model} --prompts {prompts}"
    write_results(output, command=command, axes=axes(model), prompts=prompts, rows=rows)
    out.print(str(output))


if __name__ == "__main__":
    main()
