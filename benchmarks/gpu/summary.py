"""The lines of one machine and one version of the code, put together."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.gpu.lines import Lines
from emag_export.bench.contender import PYTORCH

__all__ = ["markdown", "summarise"]

Line = Mapping[str, Any]

_KINDS = ("compare", "build", "engine", "inspect", "product", "doctor")
"""Besides speed; in this order."""

_SAME = ("steps", "pixels", "runs", "images")
"""Axes in which two speeds agree that are divided."""


def summarise(lines: Lines, machine: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that is known, by what it is; failures at the end.

    An engine that failed its comparison has its speed listed with the others, and the verdict beside it.

    Args:
        lines: Of which those of ``lines.identity`` count.
        machine: Further facts about it.
    """
    latest = list(lines.latest().values())
    found = [line for line in latest if "result" in line]
    speeds = [line for line in found if line["axes"]["kind"] == "speed"]
    return {
        "machine": {**machine, **asdict(lines.identity)},
        "speed": [
            {**_flat(line), **_ratios(line, speeds), "compare": _verdicts(line, latest)} for line in speeds
        ],
        **{kind: [_flat(line) for line in found if line["axes"]["kind"] == kind] for kind in _KINDS},
        "failed": [{**line["axes"], "failed": line["failed"]} for line in latest if "failed" in line],
    }


def _flat(line: Line) -> dict[str, Any]:
    kept = {name: line[name] for name in ("seconds", "host_memory_peak", "command", "when")}
    return {**line["axes"], **line["result"], **kept}


def _ratios(line: Line, speeds: Sequence[Line]) -> dict[str, float | None]:
    """Seconds over those of others: medians of runs one after the other, so without an interval."""
    mine, method = line["axes"], line["result"]["method"].removeprefix("two-pass ")
    wanted = {
        "to_cfg": (mine["backend"], "cfg"),
        "to_pytorch_cfg": (PYTORCH, "cfg"),
        "to_two_pass": (PYTORCH, f"two-pass {method}"),
    }
    alike = [other for other in speeds if all(other["axes"][name] == mine[name] for name in _SAME)]
    seconds = {(one["axes"]["backend"], one["result"]["method"]): _seconds(one) for one in alike}
    return {
        name: _seconds(line) / seconds[other] if other in seconds else None for name, other in wanted.items()
    }


def _seconds(line: Line) -> float:
    return float(line["result"]["seconds_per_image"])


def _verdicts(line: Line, latest: Sequence[Line]) -> dict[str, str]:
    """Bundle to how its comparison on the same engine ended; empty where there was none."""
    return dict(_verdict(other) for other in latest if _compares(other, line["axes"]["backend"]))


def _compares(line: Line, backend: str) -> bool:
    return bool(line["axes"]["kind"] == "compare" and line["axes"]["backend"] == backend)


def _verdict(line: Line) -> tuple[str, str]:
    if "failed" in line:
        return line["axes"]["bundle"], f"not compared: {line['failed']}"
    return line["axes"]["bundle"], "passed" if line["result"]["passed"] else line["result"]["failures"][0]


def markdown(summary: Mapping[str, Any]) -> str:
    """Every speed as a row of a table, and below it what failed, and on what all of it was measured."""
    lines = [_cells(_HEADERS), _cells(("---", *["--:"] * (len(_HEADERS) - 1)))]
    lines += [_cells(_row(row)) for row in summary["speed"]]
    machine = summary["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines += [
        "",
        f"{machine['device']}, driver {machine['driver'] or 'none'}; {versions}; {machine['commit']}",
    ]
    if summary["failed"]:
        lines += ["", "Failed:", ""]
    for failed in summary["failed"]:
        axes = ", ".join(str(value) for name, value in failed.items() if name != "failed")
        lines.append(f"* {axes}: {' '.join(failed['failed'].split())[-_SHOWN:]}")
    return "\n".join(lines) + "\n"


_SHOWN = 300
"""Characters of the reason of a failure in the table's file; all of it is in the other two."""

_HEADERS = (
    "method, engine",
    "pictures",
    "s / picture",
    "ms: plain",
    "track",
    "guide",
    "÷ CFG, same engine",
    "÷ CFG, PyTorch",
    "÷ two-pass",
    "GB on the GPU",
    "of the data sheet",
)


def _cells(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _row(row: Mapping[str, Any]) -> tuple[str, ...]:
    phases, memory, share = row["phases"], row["device_memory"], row["of_data_sheet"]
    ratios = (row[name] for name in ("to_cfg", "to_pytorch_cfg", "to_two_pass"))
    return (
        f"{row['method']}, {row['engine']}",
        str(row["images"]),
        f"{row['seconds_per_image']:.3f}",
        *(f"{phases[name]['ms']:.1f}" if name in phases else "" for name in ("plain", "track", "guide")),
        *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
        "" if memory is None else f"{memory['in_use'] / 1e9:.1f}",
        "" if share is None else f"{share:.0%}",
    )
