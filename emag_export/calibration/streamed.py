"""Run a model whose large weights are unread: each is read when its layer runs, and let go behind it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ["read_when_used"]


@contextmanager
def read_when_used(model: nn.Module) -> Iterator[None]:
    """Give every layer its weights while it runs.

    Args:
        model: Weights that have an attribute ``read_stored`` are unread: it is called for their numbers.
    """
    handles = []
    for module in model.modules():
        unread = {
            name: weight
            for name, weight in module.named_parameters(recurse=False)
            if hasattr(weight, "read_stored")
        }
        if unread:
            handles.append(module.register_forward_pre_hook(_Read(unread)))
            handles.append(module.register_forward_hook(_PutBack(unread), always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Read:
    def __init__(self, unread: dict[str, Any]) -> None:
        self._unread = unread

    def __call__(self, module: nn.Module, arguments: Any) -> None:
        for name, weight in self._unread.items():
            setattr(module, name, nn.Parameter(weight.read_stored(), requires_grad=False))


class _PutBack:
    def __init__(self, unread: dict[str, Any]) -> None:
        self._unread = unread

    def __call__(self, module: nn.Module, arguments: Any, result: Any) -> None:
        for name, weight in self._unread.items():
            setattr(module, name, weight)
