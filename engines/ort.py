"""onnxruntime: the reference engine on the CPU, and a second GPU path where its CUDA provider is present."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from emag_export.bundle import Bundle
from emag_export.contract import STATE_PAIRS, GraphSpec
from emag_export.engines import ort_providers
from emag_export.engines.config import EngineConfig
from emag_export.engines.cuda_device import check_gpu
from emag_export.engines.limits import MAX_ELEMENTS, largest, what_fits
from emag_export.engines.ort_cuda import CudaRuns, bind
from emag_export.engines.protocol import allocate_outputs, check_feeds
from emag_export.engines.repeats import call_key
from emag_export.errors import EngineError, InputError, MissingDependencyError
from emag_export.packages import install_command

__all__ = ["OnnxRuntimeEngine", "OrtOptions", "available_providers", "open_onnxruntime"]

_NO_BFLOAT16 = (
    "; it is bfloat16, which no CPU provider runs: take `device` cuda or `backend` torch, or build it with "
    "`precision` fp32"
)


@dataclass(frozen=True, kw_only=True)
class OrtOptions:
    """How a session runs.

    ``threads`` 0 means one per physical core. Thread spinning is off: on small machines it halves the
    speed of small graphs, and a server should not burn cores while it waits.
    """

    device: str = "cpu"
    """``cpu``, ``cuda`` or ``cuda:1``."""
    threads: int = 0
    profile: Path | None = None
    """Prefix of onnxruntime's profile, written when the engine closes."""
    provider: str | None = None
    """On a GPU: ``CUDAExecutionProvider``, also if None, ``TensorrtExecutionProvider``, or
    ``NvTensorRTRTXExecutionProvider`` from its plug-in package."""
    provider_options: Mapping[str, str] = field(default_factory=dict)
    """Further options of the provider, as onnxruntime spells them; they win over ours."""
    cuda_graphs: bool = True
    """Capture calls of graphs with state and replay them; the CUDA provider only."""
    tf32: bool = False
    """Let the CUDA provider round float32 products to 10 bits."""


def available_providers() -> list[str]:
    """Execution providers of the installed onnxruntime.

    Raises:
        MissingDependencyError: If onnxruntime is not installed.
    """
    return list(_onnxruntime().get_available_providers())


def _onnxruntime() -> Any:
    # Its Linux wheels send names and hashes of models to their maker unless told otherwise: 0 brings it back.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError(
            f"onnxruntime is not installed: {install_command('cpu')}, or {install_command('gpu')}"
        ) from error
    return onnxruntime


class OnnxRuntimeEngine:
    """One session; inputs and outputs are bound in place.

    On a GPU it launches on a stream of its own, in order with PyTorch's current one, and the host waits for
    nothing. With CUDA graphs, inputs and outputs other than the averages are copied to and from fixed
    buffers; the caller sees no difference, except that nothing else may use the GPU from another thread
    while a graph is captured, in the second call of its kind.

    Args:
        graph: The ONNX file; external data is memory-mapped from beside it.
        spec: What the graph takes and gives.
        options: Device, provider and threads.

    Raises:
        EngineError: If the GPU or the provider is missing, or the graph does not load.
        InputError: If there is no such device or provider.
    """

    def __init__(self, graph: Path, spec: GraphSpec, options: OrtOptions | None = None) -> None:
        ort = _onnxruntime()
        options = options or OrtOptions()
        self.spec = spec
        self.device = _device(options.device)
        self.name = f"onnxruntime ({options.device})"
        self._cuda: CudaRuns | None = None
        session = ort.SessionOptions()
        session.intra_op_num_threads = options.threads
        session.log_severity_level = 3
        session.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # It would make products of FP8 what its own kernels then refuse; so they are rounded and multiplied.
        session.add_session_config_entry("session.disable_quant_qdq", "1")
        if options.profile is not None:
            session.enable_profiling = True
            session.profile_file_prefix = str(options.profile)
        if self.device.type == "cuda":
            self._open_on_cuda(ort, graph, session, options)
            return
        try:
            self._session = ort.InferenceSession(str(graph), session, providers=[ort_providers.CPU])
        except Exception as error:
            remedy = _NO_BFLOAT16 if any(tensor.dtype == "bfloat16" for tensor in spec.outputs) else ""
            raise EngineError(
                f"onnxruntime {ort.__version__} cannot load {graph}: {error}{remedy}"
            ) from error

    def _open_on_cuda(self, ort: Any, graph: Path, session: Any, options: OrtOptions) -> None:
        provider = options.provider or ort_providers.CUDA
        self.device = check_gpu(self.device)
        ort_providers.check_provider(provider, ort.get_available_providers(), ort.__version__)
        if provider != ort_providers.CUDA:
            self.name = f"onnxruntime, {provider.removesuffix('ExecutionProvider')} ({options.device})"
        # Graphs without averages run once a picture; some of their nodes may have to stay on the host.
        capture = options.cuda_graphs and provider == ort_providers.CUDA
        capture = capture and any(tensor.name in STATE_PAIRS for tensor in self.spec.inputs)
        stream = torch.cuda.Stream(self.device)

        def own(name: str) -> dict[str, str]:
            return ort_providers.provider_options(
                name, self.device, stream.cuda_stream, cuda_graphs=capture, tf32=options.tf32
            )

        asked = {**own(provider), **options.provider_options}
        providers: list[Any] = [(provider, asked)]
        if provider == ort_providers.TENSORRT:
            providers.append((ort_providers.CUDA, own(ort_providers.CUDA)))  # for nodes that TensorRT refuses
        if provider == ort_providers.RTX:
            session.add_provider_for_devices(ort_providers.rtx_devices(ort, self.device), asked)
            providers = []
        try:
            # Without enable_fallback=0 it would go on silently on the CPU, with pointers into the GPU.
            self._session = ort.InferenceSession(
                str(graph), session, providers=providers or None, enable_fallback=0
            )
        except Exception as error:
            raise self._load_error(ort, graph, error, capture) from error
        if provider not in self._session.get_providers():
            raise EngineError(
                f"onnxruntime {ort.__version__} could not start {provider}: its libraries are missing or of "
                f"another CUDA than PyTorch's {torch.version.cuda}; onnxruntime.print_debug_info() lists them"
            )
        self._cuda = CudaRuns(ort, self._session, stream, cuda_graphs=capture)

    def _load_error(self, ort: Any, graph: Path, error: Exception, capture: bool) -> EngineError:
        if ort_providers.is_out_of_memory(error):
            return self._memory_error(error)
        remedy = "; it may load without `cuda_graphs`" if capture else ""
        return EngineError(f"onnxruntime {ort.__version__} cannot load {graph}: {error}{remedy}")

    def _memory_error(self, error: Exception) -> EngineError:
        return EngineError(
            f"{self.name} ran out of device memory in {self.spec.name}; generate fewer or smaller pictures "
            f"per call (`batch_size`), or end other programs on this GPU: {error}"
        )

    def run(self, feeds: Mapping[str, Tensor], out: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """See :meth:`Engine.run`."""
        sizes = check_feeds(self.spec, feeds, self.device)
        if self._cuda is not None:
            self._check_counts(sizes)
        try:
            outputs = allocate_outputs(self.spec, sizes, self.device, out)
            inputs = {name: tensor.contiguous() for name, tensor in feeds.items()}
        except torch.OutOfMemoryError as error:
            raise self._memory_error(error) from error
        try:
            if self._cuda is None:
                self._session.run_with_iobinding(bind(self._session, self.device, inputs, outputs))
            else:
                self._cuda.run(inputs, outputs, call_key(self.spec, sizes, feeds, out))
        except Exception as error:
            if self._cuda is not None and ort_providers.is_out_of_memory(error):
                raise self._memory_error(error) from error
            remedy = "; turn off `cuda_graphs`" if self._cuda is not None and self._cuda.captures else ""
            raise EngineError(f"{self.name} failed in {self.spec.name}: {error}{remedy}") from error
        return outputs

    def _check_counts(self, sizes: Mapping[str, int]) -> None:
        tensor, count = largest(self.spec, sizes)
        if count > MAX_ELEMENTS:
            raise EngineError(
                f"{tensor.name} has {count} elements in this call; onnxruntime on a GPU counts in 32 bits "
                f"and is silently wrong above {MAX_ELEMENTS}: {what_fits(self.spec, sizes)}; generate "
                "fewer or smaller pictures per call (`batch_size`, `height`, `width`)"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the session; closing twice does nothing."""
        if not hasattr(self, "_session"):
            return
        if self._cuda is not None:
            self._cuda.close()
        if self._session.get_session_options().enable_profiling:
            self._session.end_profiling()
        del self._cuda, self._session


def open_onnxruntime(config: EngineConfig, bundle: Bundle) -> Callable[[Bundle, str], OnnxRuntimeEngine]:
    """A function that opens components; see :func:`~emag_export.engines.registry.open_backend`."""
    # Other providers than its own two take standard operators only.
    own_graph = "onnxruntime" if config.provider in (None, ort_providers.CPU, ort_providers.CUDA) else None
    options = OrtOptions(
        device=config.device or "cpu",
        threads=config.threads,
        provider=config.provider,
        cuda_graphs=config.cuda_graphs,
    )

    def opener(bundle: Bundle, component: str) -> OnnxRuntimeEngine:
        with bundle.loading(component, own_graph) as graph:
            return OnnxRuntimeEngine(graph, bundle.spec(component), options)

    return opener


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"there is no device {name!r}; take cpu, cuda or cuda:0") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"onnxruntime does not run on {name} here; take cpu, cuda or cuda:0")
    return device
