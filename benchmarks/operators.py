"""Where a guided step goes on onnxruntime, by operator: ``python -m benchmarks.operators``.

The model of ``make bench``, both graphs of its bundle, by onnxruntime's own profiler.
"""

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.results import FOLDER, load_results, write_results
from benchmarks.targets import run_command
from emag_export.bundle import DENOISER, Bundle, engine_graph_file
from emag_export.cli.console import out
from emag_export.engines.ort import OnnxRuntimeEngine, OrtOptions
from emag_export.exporter.graph.examples import random_inputs

__all__ = ["RESULTS", "axes", "table"]

RESULTS = FOLDER / "operators.json"
_GRAPHS = {"standard": "model.onnx", "fused": engine_graph_file("onnxruntime")}
_CALLS = 6
"""All of them count, the first too, in which memory is allocated."""
_SIZES = {"trunk_rows": 2, "rows": 3, "tracked": 1, "h": 16, "w": 16, "text": 333}
_SHOWN = 0.01
"""Operators below this share of both graphs are put together."""


def axes() -> dict[str, Any]:
    """What is varied."""
    return {"graph": list(_GRAPHS), "model": "sd3-narrow", "sizes": dict(_SIZES)}


@click.command()
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
def main(output: Path) -> None:
    """Build, run, and write the shares; three minutes on two cores."""
    with tempfile.TemporaryDirectory() as folder:
        words = ("--weights", "random", "--components", "transformer", "-o", f"{folder}/bundle")
        run_command("build", "--model", "sd3-narrow", *words)
        bundle = Bundle(Path(folder) / "bundle")
        shares = {name: _shares(bundle, file, Path(folder) / name) for name, file in _GRAPHS.items()}
    write_results(output, command="python -m benchmarks.operators", axes=axes(), calls=_CALLS, shares=shares)
    out.print(str(output))


def _shares(bundle: Bundle, file: str, prefix: Path) -> dict[str, float]:
    """Operator to its share of the time in all operators."""
    spec = bundle.spec(DENOISER)
    feeds = random_inputs(spec, _SIZES)
    with torch.inference_mode():
        engine = OnnxRuntimeEngine(bundle.path / DENOISER / file, spec, OrtOptions(profile=prefix))
        with engine:
            for _ in range(_CALLS):
                engine.run(feeds)
    (written,) = prefix.parent.glob(f"{prefix.name}_*.json")
    spent: Counter[str] = Counter()
    for event in json.loads(written.read_text("utf-8")):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            spent[event["args"]["op_name"]] += event["dur"]
    return {name: time / spent.total() for name, time in spent.most_common()}


def table() -> tuple[list[str], list[list[str]]]:
    """Headers and a row per operator."""
    shares: dict[str, dict[str, float]] = load_results(RESULTS)["shares"]
    names = [
        name for name in _names(shares) if any(part.get(name, 0.0) >= _SHOWN for part in shares.values())
    ]
    rows = [[f"`{name}`", *(_percent(part.get(name)) for part in shares.values())] for name in names]
    rest = [sum(share for name, share in part.items() if name not in names) for part in shares.values()]
    headers = ["operator", *(f">{name} graph" for name in ("standard", "onnxruntime's own"))]
    return headers, [*rows, ["all others", *map(_percent, rest)]]


def _names(shares: dict[str, dict[str, float]]) -> list[str]:
    """All operators, those that take most first."""
    names = dict.fromkeys(name for part in shares.values() for name in part)
    return sorted(names, key=lambda name: -max(part.get(name, 0.0) for part in shares.values()))


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


if __name__ == "__main__":
    main()
