"""Watch what goes into the linears and attentions of a model, and keep the largest absolute values."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from emag_export.exporter.quantise.attention import attention_part

__all__ = ["Watch"]


class Watch:
    """Largest values by name, over everything that was watched.

    Args:
        ranges: Those of an earlier run, to be continued.
    """

    def __init__(self, ranges: dict[str, float] | None = None) -> None:
        self.ranges: dict[str, float] = dict(ranges or {})

    @contextmanager
    def over(self, model: nn.Module) -> Iterator[None]:
        """Watch within the ``with``.

        Args:
            model: Its linears are called as in the graph.
        """
        handles = [
            module.register_forward_pre_hook(partial(self._linear, name))
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def one_call(self) -> "TorchFunctionMode":
        """Watch the attentions of one call of the model, within a ``with``."""
        return _Attentions(self)

    def saw(self, name: str, tensor: Tensor, factor: float = 1.0) -> None:
        """Remember a tensor's largest value, times a factor."""
        found = float(tensor.detach().abs().amax()) * factor
        self.ranges[name] = max(self.ranges.get(name, 0.0), found)

    def _linear(self, name: str, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        self.saw(name, arguments[0])


class _Attentions(TorchFunctionMode):
    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch, self._call = watch, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention:
            query, key, value = args[:3]
            scale = (kwargs or {}).get("scale") or query.shape[-1] ** -0.5
            # The graph multiplies both by the root of what scores are multiplied by.
            for part, tensor, factor in (
                ("query", query, scale**0.5),
                ("key", key, scale**0.5),
                ("value", value, 1.0),
            ):
                self._watch.saw(attention_part(self._call, part), tensor, factor)
            self._call += 1
        return func(*args, **(kwargs or {}))
