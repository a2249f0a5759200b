"""The picture of the README: where EMAG changes most for the better, found by looking at everything.

``python -m benchmarks.figures.hero``: six pictures of each of 32 prompts with CFG and with EMAG at several
scales, by ``emag-export eval``; shown is the prompt and the scale at which ``shape_iou`` gains most. That is
the best case and no average: the result says how much is gained over all prompts, too.
"""

import json
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.results import FOLDER, load_results, write_results
from benchmarks.targets import run_command
from emag_export.cli.console import out, quiet_libraries
from emag_export.evaluation.contact import SheetRow, sheet
from emag_export.evaluation.pixels import read_pixels

__all__ = ["NUMBERS", "PICTURE", "RESULTS", "axes", "best", "numbers"]

PICTURE = Path("docs/images/hero.png")
RESULTS = FOLDER / "hero.json"
_PROMPTS = Path("benchmarks/evidence/scenes.txt")
_SCALES = (1.5, 2.0, 3.0)
_SEEDS = 6
_COLUMN = "shape_iou"
NUMBERS = ("hero-prompt", "hero-scale", "hero-gain", "hero-mean", "hero-prompts", "hero-seeds")
"""Names that :func:`numbers` knows."""


def axes() -> dict[str, Any]:
    """What is varied."""
    return {
        "method": ["cfg", "emag@emag-q"],
        "emag_scale": list(_SCALES),
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
    words = [
        "--methods",
        "cfg,emag",
        "--emag-scales",
        ",".join(map(str, _SCALES)),
        "--prompts",
        str(_PROMPTS),
    ]
    words += ["--seeds", str(_SEEDS), "--metrics", "drawn", "--images-per-call", "8", "-o", str(report)]
    run_command("eval", str(bundle), *words)
    found = json.loads((report / "results.json").read_text("utf-8"))
    chosen = best(found["settings"])
    prompt = found["prompts"][chosen["prompt"]]
    rows = [
        SheetRow(
            label=label,
            note=f"{_COLUMN} {value:.2f}",
            pictures=[read_pixels(path) for path in _pictures(report, prompt, scale)],
        )
        for label, value, scale in (
            ("CFG", chosen["cfg"], None),
            (f"EMAG-Q, s = {chosen['emag_scale']:g}", chosen["emag"], chosen["emag_scale"]),
        )
    ]
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    sheet(prompt, rows).save(PICTURE, optimize=True)
    write_results(
        RESULTS,
        command="python -m benchmarks.figures.hero",
        axes=axes(),
        column=_COLUMN,
        **{**chosen, "prompt": prompt},
    )
    out.print(str(PICTURE))


def best(settings: list[dict[str, Any]]) -> dict[str, Any]:
    """The prompt and the scale of EMAG at which the column gains most over CFG.

    Args:
        settings: Of ``results.json``; the first is CFG, the others are EMAG at several scales.
    """
    cfg, *others = settings
    before = np.array(cfg["columns"][_COLUMN]["prompts"], float)
    gains = [np.array(other["columns"][_COLUMN]["prompts"], float) - before for other in others]
    setting, prompt = np.unravel_index(int(np.nanargmax(gains)), np.shape(gains))
    chosen = others[int(setting)]
    return {
        "prompt": int(prompt),
        "emag_scale": chosen["emag_scale"],
        "cfg": float(before[prompt]),
        "emag": float(before[prompt] + gains[setting][prompt]),
        "mean_gain": float(np.nanmean(gains[setting])),
        "prompts": len(before),
    }


def _pictures(report: Path, prompt: str, scale: float | None) -> list[Path]:
    """The files of one prompt in the order of their seeds: of EMAG at a scale, of CFG where that is None."""
    found = []
    for index in report.glob("*/index.jsonl"):
        for line in index.read_text("utf-8").splitlines():
            item = json.loads(line)
            wanted = ("cfg", item["emag_scale"]) if scale is None else ("emag", scale)
            if item["prompt"] == prompt and (item["method"], item["emag_scale"]) == wanted:
                found.append((item["image"], index.parent / item["path"]))
    return [path for _, path in sorted(found)]


def numbers() -> dict[str, str]:
    """What the text beside the picture says."""
    found = load_results(RESULTS)
    return {
        "hero-prompt": f"“{found['prompt']}”",
        "hero-scale": f"{found['emag_scale']:g}",
        "hero-gain": f"{found['emag'] - found['cfg']:.2f}",
        "hero-mean": f"{found['mean_gain']:+.3f}".replace("-", "−"),
        "hero-prompts": str(found["prompts"]),
        "hero-seeds": str(_SEEDS),
    }


if __name__ == "__main__":
    main()
