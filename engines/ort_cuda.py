"""Runs of onnxruntime on a GPU: a stream of its own, and CUDA graphs.

Source: onnxruntime's ``onnxruntime_run_options_config_keys.h``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from emag_export.contract import STATE_PAIRS, GraphSpec

__all__ = ["CudaRuns", "GraphBook", "GraphKey", "bind", "graph_key"]

_ELEMENT_TYPES = {torch.float32: 1, torch.int64: 7, torch.float16: 10, torch.bfloat16: 16}
"""ONNX TensorProto element types."""

_NO_GRAPH = -1
"""``gpu_graph_id`` of a run that is neither captured nor replayed."""

GraphKey = tuple[tuple[tuple[str, int], ...], tuple[int, ...]]
"""Sizes of a call, and the addresses of its moving averages."""


def graph_key(
    spec: GraphSpec,
    sizes: Mapping[str, int],
    feeds: Mapping[str, Tensor],
    out: Mapping[str, Tensor] | None,
) -> GraphKey | None:
    """What a captured run is known by, or None if this one cannot be captured.

    A captured run reads and writes fixed addresses. Everything small is copied there and back; the averages
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


class GraphBook:
    """Numbers of CUDA graphs.

    A key seen for the first time runs plainly: capturing takes two runs, and a graph is worth it only where
    the same call comes again.

    Args:
        limit: Graphs in all. Each keeps its buffers; beyond the limit, calls run plainly.
    """

    def __init__(self, limit: int = 32) -> None:
        self._limit = limit
        self._seen: set[GraphKey] = set()
        self._numbers: dict[GraphKey, int] = {}

    def number(self, key: GraphKey | None) -> int:
        """``gpu_graph_id`` for this call: from 1 upwards, or -1 to run plainly."""
        if key is None:
            return _NO_GRAPH
        if key in self._numbers:
            return self._numbers[key]
        if key in self._seen and len(self._numbers) < self._limit:
            return self._numbers.setdefault(key, len(self._numbers) + 1)
        if len(self._seen) >= 8 * self._limit:
            self._seen.clear()  # only delays captures
        self._seen.add(key)
        return _NO_GRAPH


def bind(
    session: Any, device: torch.device, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
) -> Any:
    """An IO binding to contiguous tensors where they lie."""
    binding = session.io_binding()
    for tensors, put in ((inputs, binding.bind_input), (outputs, binding.bind_output)):
        for name, tensor in tensors.items():
            kind, shape = _ELEMENT_TYPES[tensor.dtype], list(tensor.shape)
            put(name, device.type, device.index or 0, kind, shape, tensor.data_ptr())
    return binding


@dataclass(frozen=True, kw_only=True)
class _FixedCall:
    """A call whose addresses never change."""

    binding: Any
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]


class CudaRuns:
    """Runs of one session on a stream of its own, in order with PyTorch's current stream.

    The host waits for nothing. onnxruntime before 1.27 waits at the end of every replayed graph itself.

    Args:
        ort: The module.
        session: Launches on ``stream``.
        stream: A ``torch.cuda.Stream``, not the default one, which cannot be captured.
        cuda_graphs: Whether the session was opened for capturing.
    """

    def __init__(self, ort: Any, session: Any, stream: Any, *, cuda_graphs: bool) -> None:
        self._ort, self._session, self._stream = ort, session, stream
        self.captures = cuda_graphs
        self._book = GraphBook() if cuda_graphs else GraphBook(limit=0)
        self._fixed: dict[GraphKey, _FixedCall] = {}

    def run(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor], key: GraphKey | None) -> None:
        """Fill ``outputs``, contiguous tensors that overlap no input.

        Memory of both may be freed or written to right afterwards in PyTorch's current stream, which waits.
        """
        current, device = torch.cuda.current_stream(self._stream.device), self._stream.device
        number = self._book.number(key)
        self._stream.wait_stream(current)
        try:
            # Copies to and from fixed addresses are in this stream too: calls come from any other.
            with torch.cuda.stream(self._stream):
                if key is None or number == _NO_GRAPH:
                    self._launch(bind(self._session, device, inputs, outputs), _NO_GRAPH)
                    return
                # A buffer born in inference mode could not be written to by a caller who is not.
                with torch.inference_mode(False):
                    call = self._fixed_call(key, inputs, outputs)
                for name, buffer in call.inputs.items():
                    buffer.copy_(inputs[name])
                self._launch(call.binding, number)
                for name, buffer in call.outputs.items():
                    outputs[name].copy_(buffer)
        finally:
            current.wait_stream(self._stream)

    def _fixed_call(
        self, key: GraphKey, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
    ) -> _FixedCall:
        if key not in self._fixed:
            own = {
                name: torch.empty_like(tensor) for name, tensor in inputs.items() if name not in STATE_PAIRS
            }
            state = STATE_PAIRS.values()
            results = {
                name: torch.empty_like(tensor) for name, tensor in outputs.items() if name not in state
            }
            binding = bind(self._session, self._stream.device, {**inputs, **own}, {**outputs, **results})
            self._fixed[key] = _FixedCall(binding=binding, inputs=own, outputs=results)
        return self._fixed[key]

    def _launch(self, binding: Any, number: int) -> None:
        options = self._ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(number))
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self._session.run_with_iobinding(binding, options)

    def close(self) -> None:
        """Wait for what is under way and free the fixed buffers."""
        self._stream.synchronize()
        self._fixed.clear()
