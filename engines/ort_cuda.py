"""Runs of onnxruntime on a GPU: a stream of its own, and CUDA graphs.

Sources: onnxruntime's ``onnxruntime_run_options_config_keys.h`` and ``cuda_graph.cc``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from emag_export.contract import STATE_PAIRS
from emag_export.engines.repeats import CallKey, Repeats

__all__ = ["CudaRuns", "bind"]

_ELEMENT_TYPES = {torch.float32: 1, torch.int64: 7, torch.float16: 10, torch.bfloat16: 16}
"""ONNX TensorProto element types."""

_NO_GRAPH = -1
"""``gpu_graph_id`` of a run that is neither captured nor replayed."""

_KEPT, _CAPTURED = 32, 256
"""Calls of a session whose graphs are in use at a time, and graphs it may capture in all."""


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

    number: int
    """Its ``gpu_graph_id``, from 1 upwards."""
    binding: Any
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]


class CudaRuns:
    """Runs of one session on a stream of its own, in order with PyTorch's current stream.

    The host waits for nothing. onnxruntime runs a call with a new number plainly before it captures it.

    When more calls repeat than graphs are kept, the one unused for longest gives up its buffers and its
    number, which no other call ever gets: onnxruntime would replay the old graph, at addresses that are
    somebody else's by now. The graph itself stays in the session: ``release_captured_graph`` (1.31) is there
    to free it, but does nothing for the CUDA provider, whose source ties graphs to the session's life. So a
    session captures a limited number of graphs in all; beyond that, new calls run plainly.

    Args:
        ort: The module.
        session: Launches on ``stream``.
        stream: A ``torch.cuda.Stream``, not the default one, which cannot be captured.
        cuda_graphs: Whether the session was opened for capturing.
        kept: Calls whose graphs are kept.
        captured: Graphs in all.
    """

    def __init__(
        self,
        ort: Any,
        session: Any,
        stream: Any,
        *,
        cuda_graphs: bool,
        kept: int = _KEPT,
        captured: int = _CAPTURED,
    ) -> None:
        self._ort, self._session, self._stream = ort, session, stream
        self.captures = cuda_graphs
        self._calls: Repeats[_FixedCall] = Repeats(kept if cuda_graphs else 0, self._release)
        self._numbered, self._most = 0, captured

    def run(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor], key: CallKey | None) -> None:
        """Fill ``outputs``, contiguous tensors that overlap no input.

        Memory of both may be freed or written to right afterwards in PyTorch's current stream, which waits.
        """
        current, device = torch.cuda.current_stream(self._stream.device), self._stream.device
        self._stream.wait_stream(current)
        try:
            # Copies to and from fixed addresses are in this stream too: calls come from any other.
            with torch.cuda.stream(self._stream):
                known = key in self._calls or self._numbered < self._most
                call = self._calls.get(key if known else None, lambda: self._fixed_call(inputs, outputs))
                if call is None:
                    self._launch(bind(self._session, device, inputs, outputs), _NO_GRAPH)
                    return
                for name, buffer in call.inputs.items():
                    buffer.copy_(inputs[name])
                self._launch(call.binding, call.number)
                for name, buffer in call.outputs.items():
                    outputs[name].copy_(buffer)
        finally:
            current.wait_stream(self._stream)

    def _fixed_call(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> _FixedCall:
        state = {*STATE_PAIRS, *STATE_PAIRS.values()}
        # A buffer born in inference mode could not be written to by a caller who is not.
        with torch.inference_mode(False):
            own, results = (
                {name: torch.empty_like(tensor) for name, tensor in tensors.items() if name not in state}
                for tensors in (inputs, outputs)
            )
        binding = bind(self._session, self._stream.device, {**inputs, **own}, {**outputs, **results})
        self._numbered += 1
        return _FixedCall(number=self._numbered, binding=binding, inputs=own, outputs=results)

    def _release(self, call: _FixedCall) -> None:
        if release := getattr(self._session, "release_captured_graph", None):
            release(call.number)

    def _launch(self, binding: Any, number: int) -> None:
        options = self._ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(number))
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self._session.run_with_iobinding(binding, options)

    def close(self) -> None:
        """Wait for what is under way and free the fixed buffers."""
        self._stream.synchronize()
        self._calls.clear()
