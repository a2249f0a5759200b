"""onnxruntime: the reference engine on the CPU, and a second GPU path where its CUDA provider is present."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from emag_export.contract import GraphSpec
from emag_export.engines.protocol import allocate_outputs, check_feeds
from emag_export.errors import EngineError, MissingDependencyError

__all__ = ["OnnxRuntimeEngine", "OrtOptions", "available_providers"]

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_ELEMENT_TYPES = {torch.float32: 1, torch.int64: 7, torch.float16: 10, torch.bfloat16: 16}
"""ONNX TensorProto element types."""


@dataclass(frozen=True, kw_only=True)
class OrtOptions:
    """How a session runs.

    ``threads`` 0 means one per physical core. Thread spinning is off: on small machines it halves the
    speed of small graphs, and a server should not burn cores while it waits.
    """

    device: str = "cpu"
    threads: int = 0
    profile: Path | None = None
    """Prefix of onnxruntime's profile, written when the engine closes."""


def available_providers() -> list[str]:
    """Execution providers of the installed onnxruntime.

    Raises:
        MissingDependencyError: If onnxruntime is not installed.
    """
    return list(_onnxruntime().get_available_providers())


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError("onnxruntime is not installed: pip install onnxruntime") from error
    return onnxruntime


class OnnxRuntimeEngine:
    """One session; inputs and outputs are bound in place, never copied.

    Args:
        graph: The ONNX file; external data is memory-mapped from beside it.
        spec: What the graph takes and gives.
        options: Device and threads.

    Raises:
        EngineError: If the provider is missing or the graph does not load.
    """

    def __init__(self, graph: Path, spec: GraphSpec, options: OrtOptions | None = None) -> None:
        ort = _onnxruntime()
        options = options or OrtOptions()
        self.spec = spec
        self.device = torch.device(options.device)
        self.name = f"onnxruntime ({options.device})"
        provider = _PROVIDERS.get(self.device.type)
        if provider not in ort.get_available_providers():
            raise EngineError(
                f"onnxruntime {ort.__version__} here has no provider for {options.device}; "
                "it has "
                + ", ".join(ort.get_available_providers())
                + ". For CUDA: pip install onnxruntime-gpu"
            )
        session = ort.SessionOptions()
        session.intra_op_num_threads = options.threads
        session.log_severity_level = 3
        session.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if options.profile is not None:
            session.enable_profiling = True
            session.profile_file_prefix = str(options.profile)
        try:
            self._session = ort.InferenceSession(str(graph), session, providers=[provider])
        except Exception as error:
            raise EngineError(f"onnxruntime {ort.__version__} cannot load {graph}: {error}") from error

    def run(self, feeds: Mapping[str, Tensor], out: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """See :meth:`Engine.run`."""
        sizes = check_feeds(self.spec, feeds, self.device)
        outputs = allocate_outputs(self.spec, sizes, self.device, out)
        inputs = {name: tensor.contiguous() for name, tensor in feeds.items()}
        binding = self._session.io_binding()
        for name, tensor in inputs.items():
            binding.bind_input(name, *self._location(tensor))
        for name, tensor in outputs.items():
            binding.bind_output(name, *self._location(tensor))
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise EngineError(f"{self.name} failed in {self.spec.name}: {error}") from error
        return outputs

    def _location(self, tensor: Tensor) -> tuple[str, int, int, list[int], int]:
        return (
            self.device.type,
            self.device.index or 0,
            _ELEMENT_TYPES[tensor.dtype],
            list(tensor.shape),
            tensor.data_ptr(),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session.get_session_options().enable_profiling:
            self._session.end_profiling()
        del self._session
