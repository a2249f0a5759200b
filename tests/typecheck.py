"""The checker behind the shape annotations, switched on for the whole package under pytest only."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintPep673Exception

__all__ = ["check"]

_checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
"""An int is welcome where a float is asked for, as to every static checker."""


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """beartype, with two exceptions.

    While a module is being traced nothing is checked: sizes are symbols then, and comparing two of them would
    put a guard into the graph. A method that returns ``Self`` stays as it is: jaxtyping decorates methods
    one by one, and beartype understands ``Self`` only where it decorates the class.
    """
    try:
        checked: Callable[..., Any] = _checked(function)
    except BeartypeDecorHintPep673Exception:
        return function

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (function if torch.compiler.is_exporting() else checked)(*args, **kwargs)

    return call
