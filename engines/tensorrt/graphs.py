"""A CUDA graph of one call."""

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["capture"]


def capture(enqueue: Callable[[], None], stream: Any) -> Any:
    """What ``enqueue`` enqueues, as a graph; nothing of it is run.

    TensorRT settles what depends on shapes and addresses in the first call with them, which cannot be
    captured: run ``enqueue`` once right before, on the same execution context.

    Args:
        enqueue: Enqueues the call on ``stream``.
        stream: A ``torch.cuda.Stream``, not the default one.

    Returns:
        A ``torch.cuda.CUDAGraph``.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            enqueue()
        except BaseException as error:
            try:  # CUDA has often ended the capture by then, and says so with an error that explains nothing
                graph.capture_end()
            except Exception as consequence:
                error.add_note(f"ending the capture failed as well: {consequence}")
            raise
        graph.capture_end()
    return graph
