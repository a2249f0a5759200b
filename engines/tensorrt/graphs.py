"""CUDA graphs of an engine's calls: one per sizes and state addresses, captured when a call repeats."""

from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch

__all__ = ["CallGraphs", "graph_key"]

_MOST = 32
"""Graphs kept; a run of one batch uses four: two phases, and two state buffers that take turns."""


def graph_key(
    sizes: dict[str, int], addresses: dict[str, int], generation: int
) -> tuple[tuple[tuple[str, int], ...], tuple[tuple[str, int], ...], int]:
    """What a captured graph depends on: its sizes, the addresses it reads and writes, its scratch memory."""
    return tuple(sorted(sizes.items())), tuple(sorted(addresses.items())), generation


class CallGraphs:
    """Runs a call eagerly the first time, captures it the second time, replays it from then on.

    The first call lets the engine allocate and choose kernels, which cannot be captured. Least recently
    used graphs are dropped.
    """

    def __init__(self) -> None:
        self._graphs: OrderedDict[Hashable, torch.cuda.CUDAGraph | None] = OrderedDict()

    def run(self, key: Hashable, enqueue: Callable[[], None], stream: torch.cuda.Stream) -> None:
        """Do what ``enqueue`` does on ``stream``.

        Args:
            key: Two calls with the same key read and write the same addresses.
            enqueue: Enqueues the call on ``stream``.
            stream: Not the default stream.
        """
        with torch.cuda.stream(stream):
            if key not in self._graphs:
                enqueue()
                self._graphs[key] = None
            else:
                graph = self._graphs[key]
                if graph is None:
                    graph = torch.cuda.CUDAGraph()
                    graph.capture_begin(capture_error_mode="thread_local")
                    try:
                        enqueue()
                    finally:
                        graph.capture_end()
                    self._graphs[key] = graph
                graph.replay()
        self._graphs.move_to_end(key)
        while len(self._graphs) > _MOST:
            self._graphs.popitem(last=False)

    def clear(self) -> None:
        """Drop everything; the caller makes sure that nothing is running."""
        self._graphs.clear()
