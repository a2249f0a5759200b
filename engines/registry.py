"""Backends by name: which engine opens a component of a bundle."""

from collections.abc import Callable

from emag_export.bundle import Bundle
from emag_export.engines.ort import OnnxRuntimeEngine, OrtOptions
from emag_export.engines.ort_providers import CPU, CUDA
from emag_export.engines.protocol import Engine
from emag_export.engines.tensorrt.flavour import FLAVOURS
from emag_export.engines.tensorrt.open import open_tensorrt
from emag_export.errors import InputError

__all__ = ["BACKENDS", "open_backend"]

BACKENDS = ("onnxruntime", *FLAVOURS)
"""Backends that need nothing but the bundle, and for TensorRT the engines built into it."""


def open_backend(
    name: str,
    *,
    device: str = "",
    threads: int = 0,
    provider: str | None = None,
    cuda_graphs: bool = True,
    weight_budget: int | None = None,
) -> Callable[[Bundle, str], Engine]:
    """A function that opens components of a bundle on this backend.

    Args:
        name: One of :data:`BACKENDS`.
        device: ``cpu`` or ``cuda``; empty is the CPU for onnxruntime and the GPU for TensorRT.
        threads: CPU threads; 0 lets the backend choose.
        provider: Execution provider of onnxruntime on a GPU; None is CUDA's own.
        cuda_graphs: Capture and replay calls, on a GPU.
        weight_budget: Bytes of weights that each TensorRT engine keeps on the GPU, where it streams them;
            None is what fits.

    Raises:
        InputError: If there is no such backend, or it does not run on ``device``.
        MissingDependencyError: If its module is absent.
        EngineError: If there is no device for it.
    """
    if name not in BACKENDS:
        raise InputError(f"there is no backend {name!r}; choose {', '.join(BACKENDS)}")
    if name in FLAVOURS:
        if device not in ("", "cuda"):
            raise InputError(f"{name} runs on the GPU, not on {device}; leave out --device")
        return open_tensorrt(FLAVOURS[name], cuda_graphs=cuda_graphs, weight_budget=weight_budget)
    # Other providers than its own two take standard operators only.
    own_graph = name if provider in (None, CPU, CUDA) else None
    options = OrtOptions(device=device or "cpu", threads=threads, provider=provider, cuda_graphs=cuda_graphs)

    def opener(bundle: Bundle, component: str) -> Engine:
        with bundle.loading(component, own_graph) as graph:
            return OnnxRuntimeEngine(graph, bundle.spec(component), options)

    return opener
