"""The tables and the figure of ``docs/guides/quantisation.md``, from the results.

``python -m benchmarks.quantised.tables`` draws the figure anew.
"""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks import full_size
from benchmarks.quantised.__main__ import RESULTS
from benchmarks.results import load_results
from emag_export.quantisation import Scheme
from emag_export.reference.thresholds import THRESHOLDS

__all__ = ["draw", "engines", "guidance", "limits", "main", "speed"]

Table = tuple[list[str], list[list[str]]]
"""Headers and rows."""

_FIGURE = Path("docs/images/quantised.png")


def _found() -> list[dict[str, Any]]:
    """One per processor that somebody has measured on."""
    return [load_results(path) for path in sorted(RESULTS.glob("*.json"))]


def guidance() -> Table:
    """What becomes of c, c - p and pictures; of the first processor, as rounding hardly depends on it."""
    found = _found()[0]
    cases = {case["case"]: case for case in found["cases"]}
    headers = ["", ">graph, MB", ">error of c", ">error of c - p", ">projection", ">cosine", ">choices"]
    rows = [
        *(
            [f"PyTorch, {name}", "", *_direction(floor), "", ""]
            for name, floor in cases["w8"]["floors"].items()
        ),
        *map(_case, cases.values()),
        ["CFG instead of EMAG, float32", *[""] * 6, _psnr(found["emag_beside_cfg"])],
    ]
    return [*headers, ">pictures, dB: median (lowest tenth)"], rows


def _direction(found: Mapping[str, float]) -> list[str]:
    errors = [f"{found['cond']:.1e}", f"{found['error']:.3f}"]
    return [*errors, f"{found['projection']:.3f}", f"{found['cosine']:.4f}"]


def _case(case: Mapping[str, Any]) -> list[str]:
    name = case["case"] if case["case"] == "float16" else f"`{case['case']}`"
    choices = f"{100 * case['choices']:.1f} %"
    return [name, f"{case['bytes'] / 1e6:.1f}", *_direction(case["direction"]), choices, _psnr(case)]


def _psnr(found: Mapping[str, Any]) -> str:
    return f"{found['psnr']['median']:.1f} ({found['psnr']['lowest_tenth']:.1f})"


def limits() -> Table:
    """What ``compare`` allows."""
    allowed = {scheme: THRESHOLDS[scheme].direction for scheme in Scheme}
    found = [limit for limit in allowed.values() if limit is not None]
    rows = [
        ["error of c, of its norm", *(f"≤ {limit.cond:g}" for limit in found)],
        ["error of c - p, of its norm", *(f"≤ {limit.error:g}" for limit in found)],
        ["projection on c - p", *("{:g}–{:g}".format(*limit.projection) for limit in found)],
        ["block choices that agree", *(f"≥ {100 * limit.choices:g} %" for limit in found)],
    ]
    return ["", *(f"`{scheme}`" for scheme in allowed)], rows


def speed() -> Table:
    """What int8 saves on a CPU; a column per processor."""
    found = _found()
    machines = [f"{one['machine']['processor']}, {one['machine']['cores']} cores" for one in found]
    rows = []
    for index, first in enumerate(found[0]["int8"]["speed"]):
        threads = f"{first['threads']} thread{'s' * (first['threads'] > 1)}"
        ratios = (f"**{one['int8']['speed'][index]['ratio']:.2f}**" for one in found)
        rows.append([f"step, {first['image_tokens']} image tokens, {threads}", *ratios])
    for what in ("session", "session and call"):
        own = [
            {case: memory[case][what]["host"]["own"] for case in ("int8", "float32")}
            for memory in (one["int8"]["memory"] for one in found)
        ]
        rows.append([f"memory, {what}", *(f"**{one['int8'] / one['float32']:.2f}**" for one in own)])
    return ["`int8` ÷ float32", *machines], rows


def engines() -> Table:
    """Sizes, and what it takes to make them."""
    rows = load_results(full_size.RESULTS)["rows"]
    plain = {row["part"]: row for row in rows if row["precision"] == "float16" and not row.get("scheme")}
    headers = ["", "scheme", ">graph, GB", ">÷ float16", ">plan, GB", ">÷ float16", ">calibration", ">export"]
    return headers, [_engine(row, plain[row["part"]]) for row in rows if row.get("scheme")]


def _engine(row: Mapping[str, Any], plain: Mapping[str, Any]) -> list[str]:
    made, measured = row["export"], row["export"].get("calibration")
    sizes: Iterator[str] = (
        text
        for what in ("export", "engine")
        for text in (
            f"{row[what]['bytes'] / 1e9:.2f}",
            f"{row[what]['bytes'] / plain[what]['bytes']:.2f}",
        )
    )
    calibration = "" if measured is None else f"{measured['seconds'] / measured['steps']:.0f} s a step"
    export = f"{made['seconds']:.0f} s, {made['peak']['own'] / 1e9:.2f} GB of memory"
    return [row["part"], f"`{row['scheme']}`", *sizes, calibration, export]


def draw() -> Figure:
    """Error of c - p in every guided step."""
    found = _found()[0]
    figure = Figure(figsize=(9, 4), layout="constrained")
    ax = figure.subplots()
    floors = next(case for case in found["cases"] if case["case"] == "w8")["floors_by_step"]
    for name, points in floors.items():
        ax.plot(list(map(int, points)), list(points.values()), ":", color="grey" if "b" in name else "black")
        ax.annotate(f"PyTorch, {name}", (int(list(points)[-1]), list(points.values())[-1]), fontsize="small")
    for case in found["cases"]:
        if case["case"] != "float16":
            points = case["by_step"]
            ax.plot(list(map(int, points)), list(points.values()), ".-", label=case["case"])
    ax.axhline(1, color="#d62728", linewidth=1, linestyle="--", label="as large as c - p itself")
    ax.set_yscale("log")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("step")
    ax.set_ylabel("error of c - p, of its norm")
    ax.legend(ncols=3, fontsize="small")
    return figure


def main() -> int:
    """Draw the figure."""
    draw().savefig(_FIGURE, dpi=110)
    return 0


if __name__ == "__main__":
    sys.exit(main())
