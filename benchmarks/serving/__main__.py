"""Load on servers, measured and judged: ``python -m benchmarks.serving`` (``make bench-serving``).

Three servers of tiny-sd3, loaded one at a time and in turn, with open-loop Poisson arrivals of 4, 12 and 28
steps: ours, ours with one request at a time, and a diffusers pipeline behind FastAPI. Then the scheduler on a
virtual clock is held against what was measured. With ``--call-times FILE``, ``--replicas N`` or ``--rate R``
nothing is measured: the virtual clock says what another machine, or several, would do. Writes a results file
named after the processor.
"""

import argparse
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.results import FOLDER, processor_slug, write_results
from benchmarks.serving.measure import INFINITE, LOADED, SATURATED, SATURATED_CFG, UTILISATION, measure
from benchmarks.serving.replay import extrapolate, replay, stored_table
from benchmarks.serving.servers import ALONE, CONTENDERS, DIFFUSERS, TOGETHER
from benchmarks.serving.traffic import STEPS
from emag_export.bench.report import describe_machine
from emag_export.bundle import MANIFEST, Bundle
from emag_export.runtime.batching.call_times import read_call_times

__all__ = ["RESULTS", "axes", "judge", "main"]

RESULTS = FOLDER / "serving"


def axes() -> dict[str, Any]:
    """What is varied."""
    return {"steps": list(STEPS), "servers": list(CONTENDERS), "utilisation": UTILISATION}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and judge, or extrapolate; a missed target is reported, not an error."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument(
        "--bundle", type=Path, default=Path("out/bench/tiny"), help="Of tiny-sd3; built where there is none."
    )
    parser.add_argument("--requests", type=int, default=90, help="Of every run; a multiple of 3.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--call-times", type=Path, help="Table of another machine, as a server keeps it.")
    parser.add_argument("--replicas", type=int, default=1, help="Servers that share the load.")
    parser.add_argument("--rate", type=float, help="Requests a second; all at once where it is not given.")
    given = parser.parse_args(arguments)
    if not (given.bundle / MANIFEST).is_file():
        build = ("build", "--model", "tiny-sd3", "-o", str(given.bundle))
        subprocess.run([sys.executable, "-m", "emag_export.cli.main", *build], check=True)
    bundle, console = Bundle(given.bundle), Console(highlight=False, width=max(Console().width, 110))
    if given.call_times or given.replicas > 1 or given.rate:
        table = read_call_times(given.call_times) if given.call_times else stored_table(bundle)
        rate = given.rate or INFINITE
        rows = extrapolate(bundle, table, requests=given.requests, rate=rate, replicas=given.replicas)
        console.print(_table(rows))
        return 0
    found = measure(bundle, given.requests, given.rounds, console.print)
    found["simulated"] = replay(bundle, found)
    targets = judge(found)
    console.print(_table(found["simulated"]))
    console.print(_table(targets))
    write_results(
        given.output / f"{processor_slug(describe_machine())}.json",
        command="python -m benchmarks.serving",
        axes=axes(),
        rounds=given.rounds,
        targets=targets,
        **found,
    )
    return 0


def judge(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Targets beside what was measured: medians over rounds."""

    def over(load: str, server: str, key: str) -> float:
        rows = [row for row in found["rows"] if (row["load"], row["server"]) == (load, server)]
        return float(median(row[key] for row in rows))

    def ratio(load: str, other: str, key: str = "throughput") -> float:
        return over(load, TOGETHER, key) / over(load, other, key)

    worst = max(abs(row["deviation"]) for row in found["simulated"])
    rows = (
        ("throughput ÷ one at a time, saturated", ratio(SATURATED, ALONE), 1.25, False),
        ("throughput ÷ diffusers behind FastAPI, saturated", ratio(SATURATED_CFG, DIFFUSERS), 2.0, False),
        ("p99 of 4-step requests ÷ one at a time, loaded", ratio(LOADED, ALONE, "p99_short"), 0.5, True),
        ("scheduler ÷ calls", found["scheduler_share"], 0.03, True),
        ("virtual clock against the real server, largest deviation", worst, 0.15, True),
    )
    return [
        {
            "what": what,
            "measured": round(measured, 4),
            "target": f"{'≤' if below else '≥'} {limit:g}",
            "met": measured <= limit if below else measured >= limit,
        }
        for what, measured, limit, below in rows
    ]


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(header_style="bold")
    for name in rows[0]:
        table.add_column(name, justify="left" if isinstance(rows[0][name], str) else "right")
    for row in rows:
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    return table


if __name__ == "__main__":
    sys.exit(main())
