"""``emag-export compare`` on tiny-sd3, in float32 and float16: ``python -m benchmarks.compared``."""

import json
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from benchmarks.results import FOLDER, load_results, write_results
from benchmarks.targets import run_command
from emag_export.cli.console import out
from emag_export.reference.thresholds import VELOCITIES

__all__ = ["RESULTS", "axes", "table"]

RESULTS = FOLDER / "compared.json"
_PRECISIONS = ("fp32", "fp16")


def axes() -> dict[str, Any]:
    """What is varied."""
    return {"model": "tiny-sd3", "variant": "emag-q", "precision": list(_PRECISIONS)}


@click.command()
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
def main(output: Path) -> None:
    """Build, compare, and write the result; three minutes on two cores."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for precision in _PRECISIONS:
            bundle = str(Path(folder) / precision)
            run_command("build", "--model", "tiny-sd3", "--precision", precision, "-o", bundle)
            rows.append(
                {"precision": precision, **_row(json.loads(run_command("compare", bundle, "--json")))}
            )
    write_results(output, command="python -m benchmarks.compared", axes=axes(), rows=rows)
    out.print(str(output))


def _row(found: Mapping[str, Any]) -> dict[str, Any]:
    """Of one comparison: the worst of every step."""
    velocities = [
        error for step in found["steps"] for name, error in step["errors"].items() if name in VELOCITIES
    ]
    choices = [choice for step in found["steps"] for choice in step["choices"]]
    return {
        "passed": found["passed"],
        "velocity": max(error["max_abs"] for error in velocities),
        "relative": max(error["relative"] for error in velocities),
        "choices": len(choices),
        "agree": sum(choice["engine"] == choice["reference"] for choice in choices),
        "latents": max(step["max_abs"] for step in found["free"]),
        "psnr": min(float(pair["psnr"]) for pair in found["pictures"]),
        "floor": None if found["floor"] is None else found["floor"]["ratio"],
    }


def table() -> tuple[list[str], list[list[str]]]:
    """Headers and a row per precision."""
    headers = ["precision", ">velocity, worst", ">of the largest", ">choices that agree"]
    headers += [">latents after a free run", ">picture", ">velocity ÷ what PyTorch loses"]
    rows = []
    for row in load_results(RESULTS)["rows"]:
        picture = "identical" if math.isinf(row["psnr"]) else f"{row['psnr']:.0f} dB"
        rows.append(
            [
                row["precision"],
                f"{row['velocity']:.1e}",
                f"{100 * row['relative']:.2g} %",
                f"{row['agree']} of {row['choices']}",
                f"{row['latents']:.1e}",
                picture,
                "–" if row["floor"] is None else f"{row['floor']:.2f}",
            ]
        )
    return headers, rows


if __name__ == "__main__":
    main()
