"""Parameters of which ``make check`` takes a few, and ``make test`` all."""

from collections.abc import Iterable
from typing import Any

import pytest


def mostly_slow(values: Iterable[Any], *quick: Any) -> list[Any]:
    """These parameters; those that are not ``quick`` are marked as slow."""
    marks: dict[bool, Any] = {True: (), False: pytest.mark.slow}
    every = list(values)
    assert all(value in every for value in quick), "a quick parameter that is none"
    return [pytest.param(value, marks=marks[value in quick]) for value in every]
