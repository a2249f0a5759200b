"""The tables about servers, from the results."""

from collections.abc import Iterator, Mapping
from statistics import median
from typing import Any

from benchmarks.results import load_results
from benchmarks.serving import __main__ as loaded
from benchmarks.serving import on_ray as ray
from benchmarks.serving import on_triton as triton
from benchmarks.serving import soak

__all__ = ["load", "on_ray", "on_triton", "soaked"]

Table = tuple[list[str], list[list[str]]]
"""Headers and rows."""


def load() -> Table:
    """Targets of the load test; a column for every processor that somebody has measured on."""
    found = [load_results(path) for path in sorted(loaded.RESULTS.glob("*.json"))]
    machines = [f"{one['machine']['processor']}, {one['machine']['cores']} cores" for one in found]
    columns = [{row["what"]: row for row in one["targets"]} for one in found]
    rows = [
        [
            row["what"],
            row["target"],
            *(
                f"**{column[what]['measured']:.3g}**" + ("" if column[what]["met"] else " missed")
                for column in columns
            ),
        ]
        for what, row in columns[0].items()
    ]
    first = [f"{one['first_preview']['median'] * 1000:.0f} ms" for one in found]
    return ["", "target", *machines], [*rows, ["time to the first preview, median", "", *first]]


def soaked() -> Table:
    """What a server did in minutes of mixed load."""
    found = load_results(soak.RESULTS)
    memory, counts = found["memory"], found["counts"]
    sizes = memory["mb_every_half_minute"]
    rate, low, high = soak.slope([(number / 2, size * 1e6) for number, size in enumerate(sizes)])
    grown = f"in the second half {rate:+.2f} MB a minute [{low:+.2f}, {high:+.2f}]"
    headers = ["minutes", "pictures compared", "wrong", "requests lost", "engine failures met", "own memory"]
    cells = [
        f"{found['minutes']:g}",
        *(str(counts["pictures compared"]), str(found["wrong"]), str(found["lost"])),
        *(str(counts["engine failures met"]), f"{sizes[-1]:.0f} MB, {grown}"),
    ]
    return headers, [cells]


def on_ray() -> Table:
    """A server without Ray and one on it, asked in turn."""
    found = load_results(ray.RESULTS)["found"]
    columns = [_ray_column(found[name]) for name in ("plain", "ray")]
    rows = [[shown, *(column.get(name, "–") for column in columns)] for name, shown in ray.ROWS.items()]
    return ["", ">without Ray", ">on Ray"], rows


def _ray_column(found: Mapping[str, Any]) -> dict[str, str]:
    times = {name: _seconds(found[name]) for name in ("start", "picture", "model", "back") if name in found}
    shown = {**times, "replica": _megabytes(found["replica"])}
    if "front" in found:
        parts = {"front": "front", "Ray's own processes": "of_ray", "the command": "command"}
        shown["others"] = ", ".join(f"{what} {_megabytes(found[name])}" for what, name in parts.items())
    return shown


def on_triton() -> Table:
    """Ranges over rounds, and medians."""
    results = load_results(triton.RESULTS)
    return ["", ">least", ">median", ">most"], list(_triton_rows(results))


def _triton_rows(results: Mapping[str, Any]) -> Iterator[list[str]]:
    found, memory = results["found"], results["memory"]
    for name, shown in triton.ROWS.items():
        values = (min(found[name]), median(found[name]), max(found[name]))
        yield [shown, *(f"{value:.0f}" if name == "calls" else _seconds(value) for value in values)]
    for name, shown in triton.MEMORY.items():
        yield [shown, "", _megabytes(memory[name]), ""]


def _seconds(value: float) -> str:
    value, unit = (1000 * value, "ms") if value < 1 else (value, "s")
    return f"{value:.1f} {unit}" if value < 10 else f"{value:.0f} {unit}"


def _megabytes(size: float) -> str:
    return f"{size / 1e6:.0f} MB"
