"""The speed targets, measured and judged: ``python -m benchmarks.targets`` (``make bench``).

Models are random, of the depth of SD3 and of DiT-XL/2 and a quarter of their width, so that everything
takes minutes on two cores; tiny-sd3 stands for the smallest there is. Every figure is a ratio of interleaved
runs in one process. Writes a results file and plots, named after the processor: ratios between two engines
are its own.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.results import FOLDER, processor_slug, write_results
from emag_export.bench.plots import draw_cost, draw_scaling
from emag_export.bench.report import describe_machine
from emag_export.bench.scaling import AXES

_CLI = (sys.executable, "-m", "emag_export.cli.main")
_RANDOM = ("--weights", "random", "--components", "transformer")
_BUNDLES = {
    "emag-q": ("--model", "sd3-narrow", *_RANDOM),
    "emag": ("--model", "sd3-narrow", *_RANDOM, "--variant", "emag"),
    "dit": ("--model", "dit-narrow", *_RANDOM),
    "tiny": ("--model", "tiny-sd3"),
}
_CASES = {
    "256 px": ("emag-q", "--height", "256", "--width", "256", "--startup", "--scaling"),
    "512 px": (
        *("emag-q", "--with", "emag", "--height", "512", "--width", "512"),
        *("--no-baseline", "--no-memory"),
    ),
    "tiny-sd3": ("tiny", "--rounds", "3", "--no-memory"),
    "DiT": ("dit", "--no-baseline", "--no-memory"),
}
"""What is measured, as words of ``emag-export bench``; a name of :data:`_BUNDLES` stands for its folder."""
_ORT = "onnxruntime (cpu)"
RESULTS = FOLDER / "bench"


@dataclass(frozen=True, kw_only=True)
class Target:
    """One line of the table."""

    what: str
    measured: float
    limit: float
    spread: tuple[float, float] | None = None
    note: str = ""
    of_processor: bool = False
    """A ratio of two engines, which says as much about the processor's libraries as about EMAG."""

    @property
    def met(self) -> bool:
        """Measured is no more than the limit."""
        return self.measured <= self.limit


def main() -> int:
    """Build what is missing, measure, judge; a missed target is reported, not an error."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--bundles", type=Path, default=Path("out/bench"), help="Built here, and kept.")
    arguments = parser.parse_args()
    begin, bundles = time.monotonic(), arguments.bundles
    for name, options in _BUNDLES.items():
        run_command("build", *options, "--overwrite", "-o", str(bundles / name))
    reports = {
        case: _bench(*(str(bundles / word) if word in _BUNDLES else word for word in words))
        for case, words in _CASES.items()
    }
    targets = list(judge(reports))
    minutes = (time.monotonic() - begin) / 60
    _write(arguments.output, targets, reports, minutes)
    console = Console(highlight=False)
    console.print(_table(targets))
    console.print(f"{minutes:.1f} minutes; {arguments.output}", markup=False)
    return 0


def run_command(*command: str) -> str:
    """What ``emag-export`` with these words prints; it ends this program where it fails."""
    done = subprocess.run([*_CLI, *command], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"emag-export {' '.join(command)} ended with {done.returncode}")
    return done.stdout


def _bench(*options: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(run_command("bench", *options, "--json"))
    return report


def judge(reports: dict[str, dict[str, Any]]) -> Iterator[Target]:
    """Every target, from the reports of :func:`main`."""
    small, large, tiny = (reports[name]["results"] for name in ("256 px", "512 px", "tiny-sd3"))
    query = _row(small, "emag-q", _ORT)
    yield _ratio("EMAG-Q ÷ CFG, 256 image tokens", query["to_cfg"], 1.25)
    yield _ratio("EMAG-Q ÷ CFG, 1024 image tokens", _row(large, "emag-q", _ORT)["to_cfg"], 1.25)
    yield _ratio("EMAG (map) ÷ CFG, 1024 image tokens", _row(large, "emag", _ORT)["to_cfg"], 1.45)
    dit = _row(reports["DiT"]["results"], "emag-q", _ORT)
    yield _ratio("EMAG-Q ÷ CFG, DiT of 28 blocks, 250 steps", dit["to_cfg"], 1.07)
    for name, rows, limit in (("24 blocks", small, 0.01), ("tiny-sd3", tiny, 0.05)):
        share = _row(rows, "emag-q", _ORT)["outside_engine"]
        yield Target(what=f"outside the engine, share of a run, {name}", measured=share, limit=limit)
    start = reports["256 px"]["startup"]
    yield Target(
        what="start ÷ reading the weights once",
        measured=start["ratio"],
        limit=1.2,
        note=f"{start['weights'] / 1e6:.0f} MB: read {start['read']:.2f} s, open {start['open']:.2f} s",
    )
    worst = max(reports["256 px"]["scaling"], key=lambda point: abs(point["deviation"]))
    yield Target(
        what="cost ÷ CFG against the row-blocks, largest deviation",
        measured=abs(worst["deviation"]),
        limit=0.1,
        note=f"at {worst['axis']} = {worst['value']:g}",
    )
    for what, found, limit in (
        ("EMAG-Q on onnxruntime ÷ released two-pass EMAG-Q in PyTorch eager", query["to_two_pass"], 0.5),
        ("EMAG-Q on onnxruntime ÷ plain CFG in PyTorch eager", query["to_pytorch_cfg"], 0.95),
        ("CFG on onnxruntime ÷ CFG in PyTorch eager", _row(small, "cfg", _ORT)["to_pytorch_cfg"], 1.0),
    ):
        yield replace(_ratio(what, found, limit), of_processor=True)


def _row(rows: list[dict[str, Any]], method: str, engine: str) -> dict[str, Any]:
    return next(row for row in rows if (row["method"], row["engine"]) == (method, engine))


def _ratio(what: str, found: dict[str, float], limit: float) -> Target:
    predicted = f"row-blocks say {found['row_blocks']:.3f}"
    return Target(
        what=what,
        measured=found["ratio"],
        limit=limit,
        spread=(found["low"], found["high"]),
        note=predicted,
    )


def _cells(target: Target) -> tuple[str, ...]:
    spread = "" if target.spread is None else f" [{target.spread[0]:.2f}–{target.spread[1]:.2f}]"
    verdict = "met" if target.met else "missed"
    return target.what, f"{target.measured:.3f}{spread}", f"≤ {target.limit:g}", verdict, target.note


_HEADERS = ("", "measured", "target", "", "")


def _table(targets: list[Target]) -> Table:
    grid = Table(*_HEADERS)
    for target in targets:
        grid.add_row(*_cells(target), style=None if target.met else "red")
    return grid


def axes() -> dict[str, Any]:
    """What is varied."""
    return {"case": list(_CASES), "scaling": {name: list(values) for name, values in AXES.items()}}


def _write(folder: Path, targets: list[Target], reports: dict[str, Any], minutes: float) -> None:
    name = processor_slug(describe_machine())
    write_results(
        folder / f"{name}.json",
        command="make bench",
        axes=axes(),
        minutes=round(minutes, 1),
        targets=[{**asdict(target), "met": target.met} for target in targets],
        reports=reports,
    )
    draw_cost(reports["256 px"]["results"]).savefig(folder / f"{name}-cost.png", dpi=110)
    draw_scaling(reports["256 px"]["scaling"]).savefig(folder / f"{name}-scaling.png", dpi=110)


if __name__ == "__main__":
    sys.exit(main())
