"""The speed targets, measured and judged: ``python -m benchmarks.targets`` (``make bench``).

Models are random, of SD3's depth and a quarter of its width, so that 28 steps of everything take minutes on
two cores; tiny-sd3 stands for the smallest there is. Every figure is a ratio of runs that took turns in one
process. Writes ``bench.json``, ``bench.md`` and plots.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from emag_export.bench.plots import draw_cost, draw_scaling

_CLI = (sys.executable, "-m", "emag_export.cli.main")
_RANDOM = ("--model", "sd3-narrow", "--weights", "random", "--components", "transformer")
_BUNDLES = {
    "emag-q": _RANDOM,
    "emag": (*_RANDOM, "--variant", "emag"),
    "tiny": ("--model", "tiny-sd3"),
}
_ORT, _TORCH = "onnxruntime (cpu)", "PyTorch eager"


@dataclass(frozen=True, kw_only=True)
class Target:
    """One line of the table."""

    what: str
    measured: float
    limit: float
    spread: tuple[float, float] | None = None
    note: str = ""

    @property
    def met(self) -> bool:
        """Measured is no more than the limit."""
        return self.measured <= self.limit


def main() -> int:
    """Build what is missing, measure, judge; a missed target is reported, not an error."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/bench"))
    parser.add_argument("--bundles", type=Path, default=Path("out/bench"), help="Built here, and kept.")
    arguments = parser.parse_args()
    begin, bundles = time.monotonic(), arguments.bundles
    for name, options in _BUNDLES.items():
        _run("build", *options, "--overwrite", "-o", str(bundles / name))
    narrow, maps, tiny = (str(bundles / name) for name in _BUNDLES)
    small = ("--height", "256", "--width", "256")
    reports = {
        "256 px": _bench(narrow, *small, "--startup", "--scaling"),
        "512 px": _bench(
            narrow, "--with", maps, "--height", "512", "--width", "512", "--no-baseline", "--no-memory"
        ),
        "tiny-sd3": _bench(tiny, "--rounds", "3", "--no-memory"),
    }
    targets = list(judge(reports))
    minutes = (time.monotonic() - begin) / 60
    _write(arguments.output, targets, reports, minutes)
    console = Console(highlight=False)
    console.print(_table(targets))
    console.print(f"{minutes:.1f} minutes; {arguments.output}", markup=False)
    return 0


def _run(*command: str) -> str:
    done = subprocess.run([*_CLI, *command], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"emag-export {' '.join(command)} ended with {done.returncode}")
    return done.stdout


def _bench(*options: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(_run("bench", *options, "--json"))
    return report


def judge(reports: dict[str, dict[str, Any]]) -> Iterator[Target]:
    """Every target, from the reports of :func:`main`."""
    small, large, tiny = (reports[name]["results"] for name in ("256 px", "512 px", "tiny-sd3"))
    query = _row(small, "emag-q", _ORT)
    yield _ratio("EMAG-Q ÷ CFG, onnxruntime, 256 tokens", query["to_cfg"], 1.25)
    yield _ratio("EMAG-Q ÷ CFG, onnxruntime, 1024 tokens", _row(large, "emag-q", _ORT)["to_cfg"], 1.25)
    yield _ratio("EMAG-Q, onnxruntime ÷ released two-pass EMAG-Q, PyTorch", query["to_two_pass"], 0.5)
    yield _ratio("EMAG-Q, onnxruntime ÷ plain CFG, PyTorch", query["to_pytorch_cfg"], 0.95)
    yield _ratio("EMAG (map) ÷ CFG, onnxruntime, 1024 tokens", _row(large, "emag", _ORT)["to_cfg"], 1.45)
    for name, rows, limit in (("real size", small, 0.01), ("tiny-sd3", tiny, 0.05)):
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


def _write(folder: Path, targets: list[Target], reports: dict[str, Any], minutes: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    machine = next(iter(reports.values()))["machine"]
    result = {
        "machine": {**machine, "command": "python -m benchmarks.targets"},
        "minutes": round(minutes, 1),
        "targets": [{**asdict(target), "met": target.met} for target in targets],
        "reports": reports,
    }
    (folder / "bench.json").write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    lines = ["| | measured | target | | |", "|---|---|---|---|---|"]
    lines += [f"| {' | '.join(_cells(target))} |" for target in targets]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    lines += ["", f"{machine['processor']}, {machine['cores']} cores; {versions}"]
    (folder / "bench.md").write_text("\n".join(lines) + "\n", "utf-8")
    draw_cost(reports["256 px"]["results"]).savefig(folder / "cost.png", dpi=110)
    draw_scaling(reports["256 px"]["scaling"]).savefig(folder / "scaling.png", dpi=110)


if __name__ == "__main__":
    sys.exit(main())
