"""Write the tables of README and docs from the results: ``python -m benchmarks.render`` (``make tables``).

A table stands between ``<!-- table: NAME -->`` and ``<!-- end of table -->``; what is between them is
replaced. Nothing is measured here. A test renders them again and compares.
"""

import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import (
    compared,
    counted,
    families,
    full_size,
    fusion,
    golden_errors,
    operators,
    prompt_accuracy,
    targets,
)
from benchmarks.evidence.tables import evidence_tables
from benchmarks.numbers import NUMBERS
from benchmarks.quantised import tables as quantised
from benchmarks.results import FOLDER, load_results
from benchmarks.serving import tables as serving
from benchmarks.where import matrix
from emag_export.families import FAMILIES
from tests.mutants import report as mutants

__all__ = ["DOCUMENTS", "NUMBERS", "TABLES", "render"]

_MARKED = re.compile(r"<!-- table: (?P<name>[\w-]+) -->\n.*?<!-- end of table -->", re.DOTALL)
_NUMBER = re.compile(r"<!-- number: (?P<name>[\w-]+) -->[^<\n]*<!-- / -->")

DOCUMENTS = (Path("README.md"), *sorted(Path("docs").rglob("*.md")))


def render(text: str) -> str:
    """A document with its tables and marked numbers written anew.

    Raises:
        KeyError: If it names a table or a number that there is not.
    """

    def written(match: re.Match[str]) -> str:
        return f"<!-- table: {match['name']} -->\n{TABLES[match['name']]()}\n<!-- end of table -->"

    numbers = _NUMBER.sub(
        lambda match: f"<!-- number: {match['name']} -->{NUMBERS[match['name']]()}<!-- / -->", text
    )
    return _MARKED.sub(written, numbers)


def _table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown; a header that begins with ``>`` aligns to the right."""
    rules = ["--:" if header.startswith(">") else "---" for header in headers]
    lines = [[header.removeprefix(">") for header in headers], rules, *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _golden() -> str:
    cases = load_results(golden_errors.RESULTS)["cases"]
    exact = [case for case in cases if case["recorded_state"] == "float32"]
    half = [case for case in cases if case["recorded_state"] != "float32"]
    headers = [
        "engine",
        f"float32 averages, {len(exact)} cases",
        "float16 averages in the recording, float32 in ours",
    ]
    names = {"torch": "PyTorch eager", "onnxruntime": "onnxruntime, CPU"}
    rows = (
        [shown, *(f"≤ {max(case[name] for case in part):.1e}" for part in (exact, half))]
        for name, shown in names.items()
    )
    return _table(headers, rows)


def _families() -> str:
    """A column for every processor that somebody has measured on."""
    found = [load_results(path) for path in sorted(families.RESULTS.glob("*.json"))]
    machines = [f"{one['machine']['processor']}, {one['machine']['cores']} cores" for one in found]
    rows = []
    for index, row in enumerate(found[0]["rows"]):
        cells = [one["rows"][index] for one in found]
        own = {"cfg": "CFG", "none": "one row"}[row["own_guidance"]]
        rows.append(
            [
                f"{row['what']}, {row['steps']} steps",
                own,
                f"{row['row_blocks']:.3f}",
                *(f"**{cell['ratio']:.3f}** [{cell['low']:.2f}–{cell['high']:.2f}]" for cell in cells),
            ]
        )
    return _table(["EMAG-Q ÷ the model's own guidance", "which is", "counted", *machines], rows)


def _bench(*, of_processor: bool) -> str:
    """A column for every processor that somebody has measured on."""
    found = [load_results(path) for path in sorted(targets.RESULTS.glob("*.json"))]
    columns = [{row["what"]: row for row in one["targets"]} for one in found]
    machines = [f"{one['machine']['processor']}, {one['machine']['cores']} cores" for one in found]
    rows = [
        [
            row["what"],
            _predicted(row),
            f"≤ {row['limit']:g}",
            *(_measured(column.get(what)) for column in columns),
        ]
        for what, row in columns[0].items()
        if row["of_processor"] == of_processor
    ]
    return _table(["", "counted", "target", *machines], rows)


def _predicted(row: Mapping[str, Any]) -> str:
    match = re.fullmatch(r"row-blocks say ([\d.]+)", row["note"])
    return "" if match is None else match[1]


def _measured(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "–"
    if row["spread"] is None:
        shown = f"**{row['measured']:.1%}**" if row["limit"] <= 0.1 else f"**{row['measured']:.2f}**"
    else:
        low, high = row["spread"]
        shown = f"**{row['measured']:.3f}** [{low:.2f}–{high:.2f}]"
    return shown if row["met"] else f"{shown} missed"


def _accuracy() -> str:
    columns = {}
    for model in prompt_accuracy.SUBJECTS:
        rows = load_results(prompt_accuracy.results_file(model))["rows"]
        columns[model] = {_guidance(row): row for row in rows}
    names = dict.fromkeys(name for rows in columns.values() for name in rows)
    headers = ["guidance", *(text for model in columns for text in (f">{model}", ">cost"))]
    return _table(
        headers,
        (
            [name, *(cell for rows in columns.values() for cell in _accuracy_cells(rows.get(name)))]
            for name in names
        ),
    )


def _guidance(row: Mapping[str, Any]) -> str:
    if row["guidance"] == "none":
        return "none: `cfg` with w = 1"
    return f"`{row['guidance']}`" + ("" if row["variant"] == "-" else f", {row['variant']}")


def _accuracy_cells(row: Mapping[str, Any] | None) -> tuple[str, str]:
    if row is None:
        return "–", "–"
    return f"{100 * row['accuracy']['right']:.1f} %", f"{row['row_blocks_relative_to_cfg']:.2f}"


def _fusion() -> str:
    cases = load_results(fusion.RESULTS)["cases"]
    rows = []
    for small, large in zip(cases[::2], cases[1::2], strict=True):
        blocks = {1: "one candidate block", 2: "two candidate blocks"}[small["candidates"]]
        behind = ", text behind a mask" if small["masked"] else ""
        family = f"{FAMILIES[small['family']].title}: " if "family" in small else ""
        rows.append(
            [
                f"{family}`{small['variant']}`, {small['heads']} heads, {blocks}{behind}",
                f"{small['bytes'] / 1e6:.0f} MB",
                f"{large['bytes'] / 1e6:.0f} MB",
                f"{large['maps']:.1f}",
            ]
        )
    headers = ["scratch", f">{cases[0]['tokens']} image tokens", f">{cases[1]['tokens']} image tokens"]
    return _table([*headers, f">in maps of one row at {cases[1]['tokens']}"], rows)


def _full_size() -> str:
    headers = ["model / component", "precision", ">parameters", ">graph", ">export", ">own memory", ">mapped"]
    headers += [">engine", ">build", ">own memory", ">mapped", ">scratch"]
    return _table(headers, map(_full_size_row, load_results(full_size.RESULTS)["rows"]))


def _full_size_row(row: Mapping[str, Any]) -> list[str]:
    made, engine = row["export"], row.get("engine", {"failed": "not built"})
    exported = (
        [made["failed"], "", "", "", ""]
        if "failed" in made
        else [
            f"{made['parameters'] / 1e6:.0f} M",
            _gb(made["bytes"]),
            f"{made['seconds']:.0f} s",
            *_peak(made["peak"]),
        ]
    )
    compiled = (
        [engine["failed"], "", "", "", ""]
        if "failed" in engine
        else [
            _gb(engine["bytes"]),
            f"{engine['seconds']:.0f} s",
            *_peak(engine["peak"]),
            _gb(engine["memory"]["scratch"]),
        ]
    )
    scheme = f" + {row['scheme']}" if row.get("scheme") else ""
    return [row["part"], f"{row['precision']}{scheme}", *exported, *compiled]


def _evidence(made: Callable[[], tuple[list[str], list[list[str]]]]) -> str:
    return _table(*made())


def _peak(peak: Mapping[str, int | None]) -> list[str]:
    """Own and mapped; both together where a row is older than telling them apart."""
    own, mapped = peak["own"], peak["mapped"]
    if own is None or mapped is None:
        return [f"{_gb(peak['resident'] or 0)} with mapped", ""]
    return [_gb(own), _gb(mapped)]


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


TABLES: Mapping[str, Callable[[], str]] = {
    "golden-errors": _golden,
    "cost": lambda: _table(*counted.cost()),
    "interval": lambda: _table(*counted.interval()),
    "diffusers-cost": lambda: _table(*counted.in_diffusers()),
    "families": _families,
    "bench": lambda: _bench(of_processor=False),
    "bench-processor": lambda: _bench(of_processor=True),
    "prompt-accuracy": _accuracy,
    "full-size": _full_size,
    "quantised": lambda: _table(*quantised.guidance()),
    "quantised-limits": lambda: _table(*quantised.limits()),
    "quantised-speed": lambda: _table(*quantised.speed()),
    "quantised-engines": lambda: _table(*quantised.engines()),
    "fusion": _fusion,
    "serving": lambda: _table(*serving.load()),
    "soak": lambda: _table(*serving.soaked()),
    "ray": lambda: _table(*serving.on_ray()),
    "triton": lambda: _table(*serving.on_triton()),
    "operators": lambda: _table(*operators.table()),
    "mutants": lambda: _table(*mutants.module_table(load_results(mutants.RESULTS))),
    "mutants-survivors": lambda: _table(*mutants.survivor_table(load_results(mutants.RESULTS))),
    "compared": lambda: _table(*compared.table()),
    "matrix": lambda: _table(*matrix()),
    **{name: partial(_evidence, made) for name, made in evidence_tables().items()},
}
"""Name in a marker to the table."""


def main() -> int:
    """Rewrite every document whose tables are not what the results say."""
    if not FOLDER.is_dir():
        print(f"there is no {FOLDER}; run this in the root of the repository", file=sys.stderr)
        return 2
    for path in DOCUMENTS:
        text = path.read_text("utf-8")
        rendered = render(text)
        if rendered != text:
            path.write_text(rendered, "utf-8")
            print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
