"""EMAG-Q beside every family's own guidance: ``python -m benchmarks.families`` (part of ``make bench``).

Models are random, as deep as the published ones and narrow, so that each takes a minute or two on two cores.
Every figure is a ratio of interleaved runs in one process on onnxruntime, beside what is counted.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.console import Console

from benchmarks.results import FOLDER, processor_slug, write_results
from benchmarks.targets import run_command
from emag_export.bench.report import describe_machine

__all__ = ["MODELS", "RESULTS", "axes", "main"]

RESULTS = FOLDER / "families"
_SIDE, _TEXT = 256, 64

MODELS: Mapping[str, tuple[str, int]] = MappingProxyType(
    {
        "Flux.1, 19 + 38 blocks": ("flux-narrow", 28),
        "Z-Image, 30 blocks": ("z-image-narrow", 50),
        "Qwen-Image, 60 blocks": ("qwen-narrow", 50),
    }
)
"""What people call it to the name of a model with random weights and its published number of steps."""

_ORT = "onnxruntime (cpu)"


def axes() -> dict[str, Any]:
    """What is varied."""
    return {"model": [name for name, _ in MODELS.values()], "pixels": [_SIDE], "text_tokens": [_TEXT]}


def main() -> int:
    """Build what is missing, measure, and write the results file of this processor."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--bundles", type=Path, default=Path("out/bench"), help="Built here, and kept.")
    arguments = parser.parse_args()
    console = Console(highlight=False)
    rows = []
    for shown, (model, steps) in MODELS.items():
        rows.append({"what": shown, **_measure(arguments.bundles / model, model, steps)})
        console.print(f"{shown}: {rows[-1]['ratio']:.3f}, counted {rows[-1]['row_blocks']:.3f}", markup=False)
    name = processor_slug(describe_machine())
    write_results(
        arguments.output / f"{name}.json", command="python -m benchmarks.families", axes=axes(), rows=rows
    )
    return 0


def _measure(bundle: Path, model: str, steps: int) -> dict[str, Any]:
    run_command(
        *("build", "--model", model, "--weights", "random", "--components", "transformer"),
        *("--max-sequence-length", str(_TEXT), "--overwrite", "-o", str(bundle)),
    )
    words = ("--steps", str(steps), "--height", str(_SIDE), "--width", str(_SIDE))
    report = json.loads(run_command("bench", str(bundle), *words, "--no-baseline", "--no-memory", "--json"))
    own, guided = (row for row in report["results"] if row["engine"] == _ORT)
    found: dict[str, Any] = guided["to_cfg"]
    return {
        "own_guidance": own["method"],
        "method": guided["method"],
        "steps": steps,
        "blocks": report["setup"]["blocks"],
        "width": report["setup"]["width"],
        "candidates": report["setup"]["candidates"],
        "seconds_per_image": guided["seconds_per_image"],
        **found,
    }


if __name__ == "__main__":
    sys.exit(main())
