"""Write an evaluation down: JSON, a plot, contact sheets, and one HTML page that needs nothing else."""

import base64
import io
import json
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

from matplotlib.figure import Figure

from emag_export.evaluation.contact import write_contact_sheets
from emag_export.evaluation.metrics.protocol import Column
from emag_export.evaluation.plots import draw_contrast, draw_pareto
from emag_export.evaluation.results import Results, SettingResult, Test
from emag_export.evaluation.statistics import Interval

__all__ = ["most_telling", "shown_interval", "write_report"]

_MOST_SHEETS = 24
"""Contact sheets inside the page; the folder has all."""


def write_report(results: Results, folder: Path) -> list[Path]:
    """Write ``results.json``, ``pareto.png``, ``contact/*.png`` and ``report.html``.

    Args:
        results: What was found.
        folder: Made if missing; files of the same names are replaced.

    Returns:
        The files written, contact sheets last.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data, figure, page = (folder / name for name in ("results.json", "pareto.png", "report.html"))
    text = json.dumps(results.to_json(), indent=1, ensure_ascii=False, allow_nan=False)
    data.write_text(text + "\n", encoding="utf-8")
    plot = _png(draw_pareto(results))
    figure.write_bytes(plot)
    sheets = write_contact_sheets(results, folder / "contact")
    page.write_text(_page(results, plot, sheets), encoding="utf-8")
    return [data, figure, page, *sheets]


def shown_interval(interval: Interval | None) -> tuple[str, str]:
    """Mean and bounds, to three digits."""
    if interval is None:
        return "", ""
    return f"{interval.mean:.3g}", f"{interval.low:.3g} to {interval.high:.3g}"


def most_telling(results: Results) -> int:
    """Number of the prompt whose quality differs most between settings."""
    rows = [row.values[results.quality] for row in results.settings if results.quality in row.values]
    spread = [
        max(known) - min(known) if (known := [value for value in column if value is not None]) else 0.0
        for column in zip(*rows, strict=True)
    ]
    return max(range(len(spread)), key=lambda number: spread[number]) if spread else 0


def _png(figure: Figure) -> bytes:
    made = io.BytesIO()
    figure.savefig(made, format="png", dpi=110)
    return made.getvalue()


def _page(results: Results, plot: bytes, sheets: Sequence[Path]) -> str:
    template = Template(files("emag_export.evaluation").joinpath("report.html").read_text(encoding="utf-8"))
    shown, telling = sheets[:_MOST_SHEETS], most_telling(results)
    return template.substitute(
        model=escape(str(results.facts["model"])),
        summary=escape(_summary(results)),
        plot=_data_url(plot),
        telling=str(telling),
        sheet=_data_url(sheets[telling].read_bytes()),
        head="".join(f"<th>{escape(name)}</th>" for name in _names((*results.columns, *results.set_columns))),
        settings="".join(_setting_row(results, row) for row in results.settings),
        tests_made=str(len(results.tests)),
        tests="".join(_test_row(test) for test in results.tests),
        sweep=_sweep(results),
        contrast=f'<p><img class="plot" alt="Distance of the negative per step" '
        f'src="{_data_url(_png(draw_contrast(results)))}"></p>'
        if results.contrast
        else "<p>Predictions were not looked at, or no setting has all three.</p>",
        columns="".join(
            _row([column.name, column.better, column.unit, column.summary])
            for column in (*results.columns, *results.set_columns)
        ),
        facts="".join(
            f"<tr><th>{escape(name)}</th><td>{escape(_fact(value))}</td></tr>"
            for name, value in results.facts.items()
        ),
        shown=f"{len(shown)} of {len(sheets)} prompts; all are in the folder contact.",
        pictures="".join(
            f'<figure><img alt="pictures of prompt {number}" src="{_data_url(path.read_bytes())}"></figure>'
            for number, path in enumerate(shown)
        ),
    )


def _summary(results: Results) -> str:
    facts, found = results.facts, [test for test in results.tests if test.column == results.quality]
    told = [f"{test.setting} is {test.verdict}" for test in found if test.verdict != "unclear"]
    against = found[0].baseline.split(",")[0] if found else ""
    verdict = f"In {results.quality}, against {against}: {'; '.join(told) or 'no difference shown'}."
    return (
        f"{len(results.settings)} settings, {len(results.prompts)} prompts, {facts['seeds']} seeds each from "
        f"the same noise, {facts['steps']} steps. {verdict if found else ''}"
    )


def _names(columns: Iterable[Column]) -> list[str]:
    return [column.name for column in columns]


def _fact(value: object) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{name}: {text}" for name, text in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _row(cells: Iterable[str], css: str = "") -> str:
    inside = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
    return f'<tr class="{css}">{inside}</tr>\n' if css else f"<tr>{inside}</tr>\n"


def _setting_row(results: Results, row: SettingResult) -> str:
    cells = [f"<td>{escape(row.setting.label)}</td><td>{row.cost:.3f}</td>"]
    for column in results.columns:
        mean, bounds = shown_interval(row.intervals.get(column.name))
        cells.append(f"<td>{mean} <small>[{bounds}]</small></td>" if mean else "<td></td>")
    for column in results.set_columns:
        value = row.sets.get(column.name)
        cells.append("<td></td>" if value is None else f"<td>{value:.3g}</td>")
    return f"<tr>{''.join(cells)}</tr>\n"


def _test_row(test: Test) -> str:
    mean, bounds = shown_interval(test.difference)
    values = [test.setting, test.baseline, test.column, f"{mean} [{bounds}]", str(test.prompts)]
    return _row([*values, f"{test.p:.2g}", f"{test.p_holm:.2g}", test.verdict], test.verdict)


def _sweep(results: Results) -> str:
    if results.sweep is None:
        return "<p>None: scales were given, or are the model's own.</p>"
    rows = "".join(
        _row(
            [
                method["chosen"],
                "; ".join(
                    f"{label.removeprefix(method['series']).removeprefix(', ')}: "
                    + ("–" if mean is None else f"{mean:.3g}")
                    for label, mean in method["tried"].items()
                ),
            ]
        )
        for method in results.sweep["methods"]
    )
    about = (
        f"Scales were chosen by {results.sweep['column']} on {len(results.sweep['prompts'])} other prompts, "
        "from other noise."
    )
    head = "<thead><tr><th>chosen</th><th>tried</th></tr></thead>"
    return f'<p>{escape(about)}</p><table class="facts">{head}<tbody>{rows}</tbody></table>'


def _data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
