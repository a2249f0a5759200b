"""Watch candidate blocks of an unmodified diffusers model, or their attention, whatever its family.

A hook says which block is running, and a ``TorchFunctionMode`` sees the first
``scaled_dot_product_attention`` in it, whoever calls it: that is the self- or joint attention in every
family, cross attention comes after.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from inspect import signature
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from emag_export.errors import ModelError

__all__ = ["Handler", "Passed", "passed", "watched"]

Handler = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""(query, key, value, mask) to the attention that the block goes on with."""

Passed = Callable[[Tensor, Tensor], Tensor]
"""(stream before a block, behind it) to what goes on."""

_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


class _Watch(TorchFunctionMode):
    """Hands the next attention to a handler, once."""

    def __init__(self) -> None:
        super().__init__()
        self.handler: Handler | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        handler, self.handler = (
            (self.handler, None) if func is scaled_dot_product_attention else (None, self.handler)
        )
        if handler is None:
            return func(*args, **kwargs)
        given = {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}
        if given.get("scale") not in (None, given["query"].shape[-1] ** -0.5) or given.get("is_causal"):
            raise ModelError(
                "this model scales or masks its attention in a way that the reference does not know"
            )
        return handler(given["query"], given["key"], given["value"], given.get("attn_mask"))

    def begin(self, handler: Handler, module: nn.Module, inputs: Any) -> None:
        """Before a block: its attention is the next."""
        self.handler = handler

    def end(self, index: int, module: nn.Module, inputs: Any, output: Any) -> None:
        """Behind a block: its attention must have been seen."""
        if self.handler is not None:
            self.handler = None
            raise ModelError(
                f"block {index} ran without torch's scaled_dot_product_attention, which the reference "
                "watches; set the model's attention backend to native, and remove attention processors"
            )


@contextmanager
def watched(blocks: Sequence[nn.Module], handlers: Mapping[int, Handler]) -> Iterator[None]:
    """Let handlers compute the attention of some blocks, and leave nothing behind whatever happens.

    Args:
        blocks: Of the model, in order.
        handlers: Block number to its handler.

    Raises:
        ModelError: If a block was run without its attention having been seen: another attention backend is
            set.
    """
    watch = _Watch()
    with ExitStack() as stack:
        for index, handler in handlers.items():
            stack.callback(blocks[index].register_forward_pre_hook(partial(watch.begin, handler)).remove)
            stack.callback(blocks[index].register_forward_hook(partial(watch.end, index)).remove)
        stack.enter_context(watch)
        yield


@contextmanager
def passed(
    blocks: Sequence[nn.Module], handlers: Mapping[int, Passed], streams: Sequence[str]
) -> Iterator[None]:
    """Let handlers decide what leaves some blocks, and leave nothing behind whatever happens.

    Args:
        blocks: Of the model, in order.
        handlers: Block number to its handler, called once per stream.
        streams: Parameters of a block's ``forward`` whose new values it returns, in the order in which it
            returns them; where it returns None, that stream ends.
    """
    with ExitStack() as stack:
        for index, handler in handlers.items():
            hook = partial(_changed, handler, streams)
            stack.callback(blocks[index].register_forward_hook(hook, with_kwargs=True).remove)
        yield


def _changed(
    handler: Passed,
    streams: Sequence[str],
    module: nn.Module,
    args: Any,
    kwargs: dict[str, Any],
    output: Any,
) -> Any:
    """Behind a block: what the handler lets go on."""
    given = signature(module.forward).bind(*args, **kwargs).arguments
    after = output if isinstance(output, tuple) else (output,)
    going_on = tuple(
        None if stream is None else handler(given[name], stream)
        for name, stream in zip(streams, after, strict=True)
    )
    return going_on if isinstance(output, tuple) else going_on[0]
