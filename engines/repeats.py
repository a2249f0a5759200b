"""Calls of an engine that come again: what is worth keeping for them, and for how many of them."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

from torch import Tensor

from emag_export.contract import STATE_PAIRS, GraphSpec

__all__ = ["CallKey", "Repeats", "call_key"]

CallKey = tuple[tuple[tuple[str, int], ...], tuple[int, ...]]
"""Sizes of a call, and the addresses of its moving averages."""

Kept = TypeVar("Kept")


def call_key(
    spec: GraphSpec,
    sizes: Mapping[str, int],
    feeds: Mapping[str, Tensor],
    out: Mapping[str, Tensor] | None,
) -> CallKey | None:
    """What a captured call is known by, or None if this one cannot be captured.

    A captured call reads and writes fixed addresses. Everything small is copied there and back; the averages
    are not, so their addresses are part of the key: two buffers that take turns make two graphs.

    Args:
        spec: Of the graph. One without averages runs once a picture and is not worth capturing.
        sizes: Of the named dimensions.
        feeds: Inputs.
        out: Buffers the caller gave; without one for the averages they would be new at every call.
    """
    names = [tensor.name for tensor in spec.inputs if tensor.name in STATE_PAIRS]
    written = [(out or {}).get(STATE_PAIRS[name]) for name in names]
    state = [*(feeds[name] for name in names), *(tensor for tensor in written if tensor is not None)]
    if not names or len(state) < 2 * len(names) or not all(tensor.is_contiguous() for tensor in state):
        return None
    return tuple(sorted(sizes.items())), tuple(tensor.data_ptr() for tensor in state)


class Repeats(Generic[Kept]):
    """Keeps something for each call that has come at least twice, and drops what was unused for longest.

    Capturing a call costs more than running it, and what is kept takes memory: a call that never comes again
    shall cost neither.

    Args:
        limit: Calls that something is kept for; with 0 nothing ever is.
        drop: Told what is given up, before anything new is made.
    """

    def __init__(self, limit: int, drop: Callable[[Kept], None] = lambda kept: None) -> None:
        self._limit, self._drop = limit, drop
        self._seen: OrderedDict[CallKey, None] = OrderedDict()
        self._kept: OrderedDict[CallKey, Kept] = OrderedDict()

    def __contains__(self, key: CallKey | None) -> bool:
        return key in self._kept

    def get(self, key: CallKey | None, make: Callable[[], Kept]) -> Kept | None:
        """What is kept for this call, made now if it comes for the second time; None otherwise.

        Args:
            key: Of the call; None for one that nothing can be kept for.
            make: Makes what is kept.
        """
        if key is None or not self._limit:
            return None
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        if key not in self._seen:
            self._seen[key] = None
            if len(self._seen) > 8 * self._limit:
                self._seen.popitem(last=False)
            return None
        while len(self._kept) >= self._limit:
            self._drop(self._kept.popitem(last=False)[1])
        self._kept[key] = make()
        del self._seen[key]
        return self._kept[key]

    def clear(self) -> None:
        """Forget everything without dropping it one by one: whoever owns it is about to end."""
        self._seen.clear()
        self._kept.clear()
