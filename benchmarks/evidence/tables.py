"""The tables of ``docs/results/evidence.md`` and the README, from the results of the suites."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

from benchmarks.evidence.__main__ import results_file
from benchmarks.evidence.suites import SUITES
from benchmarks.results import load_results

__all__ = ["contrast", "evidence_tables", "headline", "settings", "tuning"]

Table = tuple[list[str], list[list[str]]]
"""Headers and rows."""
_SHOWN = ("right", "edge_error", "diversity")
"""Columns beside the one that is tested in the table."""
_SETS = ("fid", "precision", "recall")
_VERDICTS = {"better": "**better**", "worse": "**worse**", "different": "different", "unclear": ""}


def settings(name: str, *, tuned: bool = False) -> Table:
    """Every setting of a suite: cost, quality, difference from the baseline, and what else was measured.

    Args:
        name: Of a suite.
        tuned: With scales from the sweep.

    Returns:
        Headers and rows.
    """
    found = load_results(results_file(name, tuned=tuned))["results"]
    quality, baseline = found["quality"], found["facts"]["baseline"]
    tests = {test["setting"]: test for test in found["tests"] if test["column"] == quality}
    sets = [column for column in _SETS if column in found["settings"][0]["sets"]]
    rows = []
    for row in found["settings"]:
        columns, test = row["columns"], tests.get(row["label"])
        rows.append(
            [
                f"`{row['label']}`",
                f"{row['row_blocks_relative_to_cfg']:.2f}",
                f"{columns[quality]['mean']:.4f}" if quality in columns else "–",
                *(("", "") if test is None else (_interval(test["difference"]), _verdict(test))),
                *(f"{columns[column]['mean']:.3f}" if column in columns else "–" for column in _SHOWN),
                *(f"{row['sets'][column]:.3g}" for column in sets),
            ]
        )
    headers = ["", ">× CFG", f">`{quality}`", f">difference from `{baseline}`", ">p, corrected"]
    return [*headers, *(f">`{column}`" for column in (*_SHOWN, *sets))], rows


def headline() -> Table:
    """The README's: the methods most people ask for, at published and at tuned scales."""
    published, tuned = (
        load_results(results_file("tiny-sd3", tuned=tuned))["results"] for tuned in (False, True)
    )
    rows = []
    for name in (
        "none",
        "cfg",
        "cfg+interval",
        "apg",
        "pag",
        "slg",
        "emag@emag-q",
        "emag@emag",
        "emag+apg@emag",
    ):
        cells = [_cells(found, name) for found in (published, tuned)]
        rows.append([f"`{name}`", cells[0][0], *cells[0][1:], *cells[1][1:]])
    return ["", ">× CFG", ">`shape_iou`", ">all right", ">tuned", ">all right"], rows


def _cells(found: Mapping[str, Any], method: str) -> tuple[str, str, str]:
    row = next(row for row in found["settings"] if row["method"] == method)
    quality = found["quality"]
    verdicts = {test["setting"]: test["verdict"] for test in found["tests"] if test["column"] == quality}
    marks = {"better": " ▲", "worse": " ▼"}
    mark = marks.get(verdicts.get(row["label"], ""), "")
    right = f"{100 * row['columns']['right']['mean']:.0f} %"
    return (
        f"{row['row_blocks_relative_to_cfg']:.2f}",
        f"{row['columns'][quality]['mean']:.3f}{mark}",
        right,
    )


def tuning(name: str) -> Table:
    """What the sweep chose, and how far the best and the worst of its settings lie apart."""
    found = load_results(results_file(name, tuned=True))["results"]["sweep"]
    rows = []
    for method in found["methods"]:
        values = [value for value in method["tried"].values() if value is not None]
        if len(values) > 1:
            rows.append(
                [f"`{method['chosen']}`", str(len(values)), f"{min(values):.4f}", f"{max(values):.4f}"]
            )
    return ["chosen", ">tried", f">least `{found['column']}`", ">most"], rows


def contrast(name: str) -> Table:
    """Where the negative of every setting lies that has all three predictions."""
    found = load_results(results_file(name))["results"]["contrast"]
    rows = [[f"`{label}`", *_spread(steps)] for label, steps in found.items()]
    headers = [
        "",
        ">steps",
        ">first",
        ">median",
        ">most",
        ">last",
        ">frequency of `c - p`",
        ">of `c - u`",
        "block",
    ]
    return headers, rows


def _spread(steps: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Ratios, and median frequencies."""
    ratios = [step["ratio"] for step in steps]
    yield f"{steps[0]['step']} to {steps[-1]['step']}"
    for value in (ratios[0], median(ratios), max(ratios), ratios[-1]):
        yield f"{value:.3f}"
    for name in ("near", "far"):
        yield f"{median(step[name] for step in steps):.3f}"
    counts = Counter(block for step in steps for block in step["blocks"])
    shares = [f"{block}: {count / counts.total():.0%}" for block, count in counts.most_common(3)]
    yield ", ".join(shares) if len(counts) <= 3 else f"{', '.join(shares)}, …"


def _interval(interval: Mapping[str, float]) -> str:
    return f"{interval['mean']:+.4f} [{interval['low']:+.4f} to {interval['high']:+.4f}]".replace("-", "−")


def _verdict(test: Mapping[str, Any]) -> str:
    mark = _VERDICTS[test["verdict"]]
    return f"{test['p_holm']:.2g}" + (f" {mark}" if mark else "")


def evidence_tables() -> dict[str, Callable[[], Table]]:
    """Name in a marker to what makes headers and rows."""
    found: dict[str, Callable[[], Table]] = {
        "evidence": headline,
    }
    for name, suite in SUITES.items():
        found[f"evidence-{name}"] = partial(settings, name)
        if suite.probes:
            found[f"evidence-{name}-contrast"] = partial(contrast, name)
        if suite.tuned:
            found[f"evidence-{name}-tuned"] = partial(settings, name, tuned=True)
            found[f"evidence-{name}-sweep"] = partial(tuning, name)
    return found
