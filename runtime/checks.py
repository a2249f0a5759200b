"""Range checks for numbers a person typed; each error names the option and what it may be."""

import math

from emag_export.errors import InputError

__all__ = ["require_finite", "require_range"]


def require_finite(**values: float) -> None:
    """Refuse NaN and infinities.

    Raises:
        InputError: Naming the first value that is not a finite number.
    """
    for name, value in values.items():
        if not math.isfinite(value):
            raise InputError(f"`{name}` is {value}; give a finite number")


def require_range(low: float, high: float, **values: float) -> None:
    """Refuse values outside ``low … high``, both included, and NaN.

    Raises:
        InputError: Naming the first value outside.
    """
    for name, value in values.items():
        if not low <= value <= high:
            raise InputError(f"`{name}` is {value}; it must lie between {low} and {high}")
