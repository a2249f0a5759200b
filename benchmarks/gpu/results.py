"""What is kept of what a child printed."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from emag_export.reference.thresholds import VELOCITIES

__all__ = ["failure_is_a_result", "key_in", "result_of"]

_SHOWN = 5
"""Failures of a comparison that are kept in words."""


def result_of(kind: str, data: Any) -> dict[str, Any] | None:
    """The result in a line.

    Args:
        kind: Of the item.
        data: What its command printed, parsed.

    Returns:
        Plain data; None where everything was there already and nothing was done.
    """
    return _KEPT[kind](data) if kind in _KEPT else dict(data)


def failure_is_a_result(kind: str) -> bool:
    """Whether a command that fails still prints what it found: figures above their thresholds are figures."""
    return kind in ("compare", "doctor")


def key_in(folder: Path) -> str | None:
    """Key of the bundle in a folder; None if there is none."""
    try:
        return str(json.loads((folder / "bundle.json").read_text("utf-8")).get("key"))
    except (OSError, json.JSONDecodeError):
        return None


def _engine(data: Mapping[str, Any]) -> dict[str, Any] | None:
    return dict(data) if data["built"] else None


def _compare(data: Mapping[str, Any]) -> dict[str, Any]:
    """The verdict and the largest of every figure, without the figures of every step."""
    errors = [(name, error) for step in data["steps"] for name, error in step["errors"].items()]
    choices = [choice for step in data["steps"] for choice in step["choices"]]
    agree = sum(choice["reference"] == choice["engine"] for choice in choices)
    return {
        "passed": data["passed"],
        "failures": data["failures"][:_SHOWN],
        "failures_in_all": len(data["failures"]),
        "velocity_max_abs": _worst([error["max_abs"] for name, error in errors if name in VELOCITIES]),
        "velocity_relative": _worst([error["relative"] for name, error in errors if name in VELOCITIES]),
        "average_relative": _worst([error["relative"] for name, error in errors if name == "ema_state"]),
        "floor": data["floor"],
        "choices": len(choices),
        "choices_that_agree": agree,
        "free_max_abs": data["free"][-1]["max_abs"],
        "pictures": data["pictures"],
    }


def _worst(values: list[Any]) -> Any:
    """The largest; a number that JSON lacks is its name, and worse than any."""
    named = [value for value in values if isinstance(value, str)]
    return named[0] if named else max(values, default=None)


def _doctor(data: Mapping[str, Any]) -> dict[str, Any]:
    return {check["check"]: check["found"] for check in data["checks"]}


def _inspect(data: Any) -> dict[str, Any]:
    return {"engines": data}


_KEPT: Mapping[str, Callable[[Any], dict[str, Any] | None]] = MappingProxyType(
    {"engine": _engine, "inspect": _inspect, "compare": _compare, "doctor": _doctor}
)
"""Kinds of which not everything is kept."""
