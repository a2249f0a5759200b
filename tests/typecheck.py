"""The checker behind the shape annotations, switched on for the whole package under pytest only."""

import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import jaxtyping
import torch
from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintPep673Exception

__all__ = ["check", "unchecked"]

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


@contextmanager
def unchecked() -> Iterator[ModuleType]:
    """Nothing is checked: ``torch.compile`` traces Python, and not every check can be traced.

    Yields:
        The module ``emag_export.exporter.graph.fork``, loaded again without the hook.
    """
    names = [
        "emag_export.families.protocol",
        "emag_export.families.heads",
        "emag_export.families.sd3.graph",
        "emag_export.families.dit.graph",
        "emag_export.exporter.graph.tracking",
        "emag_export.exporter.graph.averaging",
        "emag_export.exporter.graph.stateless",
        "emag_export.exporter.graph.kinds",
        "emag_export.exporter.graph.fork",
    ]
    checked = {name: importlib.import_module(name) for name in names}
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        # For as long as it is used: a family's module is looked up by name when a model is forked.
        for name in names:
            fork = _load(name)
        yield fork
    finally:
        sys.modules.update(checked)
        jaxtyping.config.update("jaxtyping_disable", False)


def _load(name: str) -> ModuleType:
    """From its file, past the hook, which sits where modules are looked for by name."""
    file = Path(__file__).parent.parent.joinpath(*name.split(".")).with_suffix(".py")
    spec = spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
