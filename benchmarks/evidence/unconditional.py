"""tiny-dit without any class: what EMAG does where there is nothing that classifier-free guidance could use.

``python -m benchmarks.evidence.unconditional``: pictures of the null class by ``emag-only``, held against
drawings of random classes, at several scales and for every negative. A few minutes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.evidence.__main__ import RESULTS
from benchmarks.results import write_results
from emag_export.cli.console import out, progress_bar, quiet_libraries, table
from emag_export.evaluation.metrics.drawn_distribution import DrawnDistribution
from emag_export.evaluation.truth import truth_of
from emag_export.exporter.build import build
from emag_export.kinds import Variant
from emag_export.options import BuildOptions
from emag_export.runtime.pipeline import Pipeline
from emag_export.runtime.request import GenerationRequest, default_request
from emag_export.tiny_dit.classes import CLASSES, class_names

__all__ = ["FILE", "axes", "main"]

FILE = RESULTS / "unconditional.json"
_MODEL = "tiny-dit"
_SCALES = {
    Variant.EMAG_Q: (1.0, 3.0, 5.0),
    Variant.EMAG: (3.0,),
    Variant.IDENTITY: (1.75,),
    Variant.SKIP: (1.75,),
}
"""s of each negative; at 1 there is no guidance, whichever it is."""
_PICTURES = 160
_PER_CALL = 16


def axes() -> dict[str, Any]:
    """What is varied."""
    return {"scales": {str(variant): list(scales) for variant, scales in _SCALES.items()}}


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), default=Path("out/evidence"), show_default=True)
def main(folder: Path) -> None:
    """Draw, compare, print a table, and write the results."""
    quiet_libraries()
    rows: list[dict[str, Any]] = []
    for variant, scales in _SCALES.items():
        bundle = build(_MODEL, folder / "bundles" / f"{_MODEL}-{variant}", BuildOptions(variant=variant))
        metric = DrawnDistribution(
            truth_of(bundle.labels), [class_names(label)[0] for label in range(len(CLASSES))]
        )
        references = np.stack([metric.features(pixels) for pixels in metric.references()])
        with Pipeline.open(bundle) as pipeline:
            for scale in scales:
                base = default_request(bundle, "0")
                guidance = replace(base.guidance, name="emag-only", emag_scale=scale)
                base = replace(base, prompt="", guidance=guidance)
                requests = [replace(base, seed=seed) for seed in range(_PICTURES)]
                label = f"{variant}, s {scale:g}"
                features = np.stack([metric.features(pixels) for pixels in _drawn(pipeline, requests, label)])
                cost = pipeline.prepare(requests[:1]).plan.cost.relative_to_cfg
                found = {name: None if value is None else round(value, 5) for name, value in
                         metric.score(features, references).items()}  # fmt: skip
                rows.append({"variant": str(variant), "scale": scale, "cost": round(cost, 3), **found})
    grid = table("", ">s", *(f">{name}" for name in list(rows[0])[2:]))
    for row in rows:
        grid.add_row(
            row["variant"], f"{row['scale']:g}", *(f"{value:.3g}" for value in list(row.values())[2:])
        )
    out.print(grid)
    command = "python -m benchmarks.evidence.unconditional"
    write_results(FILE, command=command, axes=axes(), pictures=_PICTURES, rows=rows)


def _drawn(
    pipeline: Pipeline, requests: Sequence[GenerationRequest], label: str
) -> Iterator[np.ndarray[Any, Any]]:
    starts = range(0, len(requests), _PER_CALL)
    with progress_bar(label, len(starts)) as progress:
        for start in starts:
            *_, last = pipeline.denoise(pipeline.prepare(requests[start : start + _PER_CALL]))
            yield from pipeline.decode(last.latents)
            progress.advance(progress.task_ids[0])


if __name__ == "__main__":
    main()
