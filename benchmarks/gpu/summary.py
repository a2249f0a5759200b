"""The lines of one machine and one version of the code, put together."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.gpu.lines import Lines
from emag_export.bench.contender import PYTORCH

__all__ = ["HEADERS", "rows", "summarise"]

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


def rows(summary: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Of every speed the cells of a table: see :data:`HEADERS`."""
    for row in summary["speed"]:
        phases = row["phases"]
        memory = row["device_memory"]
        yield (
            f"{row['method']}, {row['engine']}",
            str(row["images"]),
            f"{row['seconds_per_image']:.3f}",
            *(f"{phases[name]['ms']:.1f}" if name in phases else "" for name in ("plain", "track", "guide")),
            *("" if row[name] is None else f"{row[name]:.2f}" for name in ("to_cfg", "to_two_pass")),
            "" if memory is None else f"{memory['in_use'] / 1e9:.1f}",
            "" if row["of_data_sheet"] is None else f"{row['of_data_sheet']:.0%}",
        )


HEADERS = (
    "method",
    ">pictures",
    ">s / picture",
    ">ms: plain",
    ">track",
    ">guide",
    ">÷ CFG, same engine",
    ">÷ two-pass",
    ">GB on the GPU",
    ">of the data sheet",
)
"""Of the table; ``>`` aligns to the right."""
