"""The picture of the README: where EMAG changes most, found by looking at everything.

``python -m benchmarks.figures.hero``: six pictures of each of 32 prompts without guidance, with CFG and with
EMAG at several scales, by ``emag-export eval``; shown is the prompt and the scale at which EMAG's pictures
differ most from CFG's. That is the largest case and no average: the result says what is gained there and over
all prompts.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import click
import numpy as np

from benchmarks.results import FOLDER, load_results, write_results
from benchmarks.targets import run_command
from emag_export.cli.console import out, quiet_libraries
from emag_export.evaluation.contact import SheetRow, sheet
from emag_export.evaluation.metrics.protocol import Pixels
from emag_export.evaluation.pixels import read_pixels

__all__ = ["NUMBERS", "PICTURE", "RESULTS", "axes", "largest"]

PICTURE = Path("docs/images/hero.png")
RESULTS = FOLDER / "hero.json"
_PROMPTS = Path("benchmarks/evidence/scenes.txt")
_SCALES = (1.5, 2.0, 3.0)
_SEEDS = 6
_COLUMN = "shape_iou"
_AMPLIFIED = 2

Drawn = Mapping[tuple[str, str, float | None], Sequence[Pixels]]
"""(method, prompt, scale of EMAG) to its pictures, in the order of their seeds."""


def axes() -> dict[str, Any]:
    """What is varied."""
    scales = list(_SCALES)
    return {
        "method": ["none", "cfg", "emag"],
        "emag_scale": scales,
        "seeds": _SEEDS,
        "prompts": _PROMPTS.stem,
    }


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), default=Path("out/hero"), show_default=True)
def main(folder: Path) -> None:
    """Draw, choose, and write picture and result; six minutes on two cores."""
    quiet_libraries()
    bundle, report = folder / "bundle", folder / "report"
    run_command("build", "--model", "tiny-sd3", "-o", str(bundle))
    words = ["--methods", "none,cfg,emag", "--emag-scales", ",".join(map(str, _SCALES))]
    words += ["--prompts", str(_PROMPTS), "--seeds", str(_SEEDS), "--metrics", "drawn"]
    run_command("eval", str(bundle), *words, "--images-per-call", "8", "-o", str(report))
    drawn = _drawn(report)
    prompt, scale = largest(drawn)
    found = json.loads((report / "results.json").read_text("utf-8"))
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    _sheet(drawn, prompt, scale).save(PICTURE, optimize=True)
    chosen = {"prompt": prompt, "emag_scale": scale, "prompts": len(found["prompts"]), "column": _COLUMN}
    write_results(
        RESULTS,
        command="python -m benchmarks.figures.hero",
        axes=axes(),
        **chosen,
        **_values(found, found["prompts"].index(prompt), scale),
    )
    out.print(str(PICTURE))


def _drawn(report: Path) -> Drawn:
    found: dict[tuple[str, str, float | None], list[tuple[int, Pixels]]] = {}
    for index in report.glob("*/index.jsonl"):
        for line in index.read_text("utf-8").splitlines():
            item = json.loads(line)
            scale = item["emag_scale"] if item["method"] == "emag" else None
            pictures = found.setdefault((item["method"], item["prompt"], scale), [])
            pictures.append((item["image"], read_pixels(index.parent / item["path"])))
    return {
        key: [pixels for _, pixels in sorted(some, key=lambda pair: pair[0])] for key, some in found.items()
    }


def largest(drawn: Drawn) -> tuple[str, float]:
    """Prompt and scale at which pictures with EMAG differ most from those with CFG: the mean over pixels."""
    differences = {
        (prompt, scale): np.mean(
            [_difference(*pair) for pair in zip(some, drawn["cfg", prompt, None], strict=True)]
        )
        for (method, prompt, scale), some in drawn.items()
        if method == "emag" and scale is not None
    }
    return max(differences, key=lambda key: float(differences[key]))


def _difference(one: Pixels, other: Pixels) -> float:
    return float(np.abs(one.astype(float) - other).mean())


def _sheet(drawn: Drawn, prompt: str, scale: float) -> Any:
    """Four rows of six."""
    cfg, emag = drawn["cfg", prompt, None], drawn["emag", prompt, scale]
    changed = [
        (np.abs(one.astype(int) - other) * _AMPLIFIED).clip(0, 255).astype(np.uint8)
        for one, other in zip(cfg, emag, strict=True)
    ]
    return sheet(
        prompt,
        [
            SheetRow(label="no guidance", pictures=drawn["none", prompt, None]),
            SheetRow(label="CFG", pictures=cfg),
            SheetRow(label=f"EMAG, s = {scale:g}", pictures=emag),
            SheetRow(label=f"what EMAG changed, {_AMPLIFIED} times as bright", pictures=changed),
        ],
    )


def _values(found: Mapping[str, Any], prompt: int, scale: float) -> dict[str, float]:
    """The column at the shown prompt, and what EMAG gains over CFG there and over all prompts."""
    columns = {
        (row["method"], row["emag_scale"]): np.array(row["columns"][_COLUMN]["prompts"], float)
        for row in found["settings"]
    }
    cfg, emag = columns["cfg", None], columns["emag", scale]
    return {
        "cfg": float(cfg[prompt]),
        "emag": float(emag[prompt]),
        "mean_gain": float(np.nanmean(emag - cfg)),
    }


def _found(name: str) -> Any:
    return load_results(RESULTS)[name]


NUMBERS: Mapping[str, Callable[[], str]] = MappingProxyType(
    {
        "hero-prompt": lambda: f"“{_found('prompt')}”",
        "hero-scale": lambda: f"{_found('emag_scale'):g}",
        "hero-cfg": lambda: f"{_found('cfg'):.2f}",
        "hero-emag": lambda: f"{_found('emag'):.2f}",
        "hero-mean": lambda: f"{_found('mean_gain'):+.3f}".replace("-", "−"),
        "hero-prompts": lambda: str(_found("prompts")),
        "hero-seeds": lambda: str(_found("axes")["seeds"]),
    }
)
"""What the text beside the picture says, by the name of its mark."""


if __name__ == "__main__":
    main()
