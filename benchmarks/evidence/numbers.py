"""Single figures of the evidence within sentences, by the name of their mark."""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from statistics import median
from types import MappingProxyType
from typing import Any

from benchmarks.evidence.__main__ import results_file
from benchmarks.evidence.suites import SUITES
from benchmarks.results import load_results

__all__ = ["NUMBERS"]


def _found(suite: str) -> Mapping[str, Any]:
    results: Mapping[str, Any] = load_results(results_file(suite))["results"]
    return results


def _setting(suite: str, method: str) -> Mapping[str, Any]:
    rows = _found(suite)["settings"]
    return next(row for row in rows if method in (row["method"], row["label"]))


def _quality(suite: str, method: str, digits: int) -> str:
    return f"{_setting(suite, method)['columns']['shape_iou']['mean']:.{digits}f}"


def _cost(method: str) -> str:
    return f"{_setting('tiny-sd3', method)['row_blocks_relative_to_cfg']:.3g}"


def _differences(suite: str) -> Iterator[tuple[str, float]]:
    """Setting and the mean difference of its outlines from the baseline's."""
    for test in _found(suite)["tests"]:
        if test["column"] == "shape_iou":
            yield test["setting"], test["difference"]["mean"]


def _largest(suite: str, wanted: Callable[[str], bool] = lambda setting: True) -> str:
    """Rounded up: it is written behind "at most"."""
    most = max(abs(mean) for setting, mean in _differences(suite) if wanted(setting))
    return f"{math.ceil(1000 * most) / 1000:.3f}"


def _ratios(suite: str, method: str) -> list[float]:
    """|c - p| / |c - u| in every step that has both."""
    contrast = _found(suite)["contrast"]
    return [step["ratio"] for label, steps in contrast.items() if label.startswith(method) for step in steps]


def _range(suite: str, method: str) -> str:
    ratios = _ratios(suite, method)
    return f"{min(ratios):.2f} to {max(ratios):.2f}"


def _frequencies(choose: Callable[[list[float]], float]) -> str:
    """The least, or highest, of the median frequencies of c - p, without CADS."""
    found = [
        median(step["near"] for step in steps)
        for suite in ("tiny-sd3", "blocks")
        for label, steps in _found(suite)["contrast"].items()
        if "cads" not in label
    ]
    return f"{choose(found):.2f}"


def _minutes() -> str:
    """Of all suites together; none of them was continued."""
    runs = [(name, tuned) for name, suite in SUITES.items() for tuned in (False, True)[: 1 + suite.tuned]]
    return f"{sum(load_results(results_file(name, tuned=tuned))['minutes'] for name, tuned in runs):.0f}"


def _plain_emag(setting: str) -> bool:
    """Not over APG or CADS, nor in an interval, nor without an unconditional row."""
    return setting.startswith("emag@")


NUMBERS: Mapping[str, Callable[[], str]] = MappingProxyType(
    {
        "evidence-minutes": _minutes,
        "tiny-sd3-none-iou": partial(_quality, "tiny-sd3", "none", 3),
        "tiny-sd3-cfg-iou": partial(_quality, "tiny-sd3", "cfg", 3),
        "tiny-dit-none-iou": partial(_quality, "tiny-dit", "none", 2),
        "tiny-dit-cfg-iou": partial(_quality, "tiny-dit", "cfg", 2),
        "tiny-sd3-emag-q-cost": partial(_cost, "emag@emag-q"),
        "tiny-sd3-slg-cost": partial(_cost, "slg"),
        "tiny-sd3-emag-difference": partial(_largest, "tiny-sd3", _plain_emag),
        "blocks-difference": partial(_largest, "blocks"),
        "windows-difference": partial(_largest, "windows"),
        "emag-q-contrast": partial(_range, "tiny-sd3", "emag@emag-q"),
        "slg-contrast": partial(_range, "tiny-sd3", "slg"),
        "s2-contrast": partial(_range, "tiny-sd3", "s2"),
        "pag-contrast": partial(_range, "tiny-sd3", "pag"),
        "contrast-frequency-least": partial(_frequencies, min),
        "contrast-frequency-most": partial(_frequencies, max),
    }
)
"""Name to the figure as it is written."""
