"""Providers of onnxruntime on NVIDIA GPUs: what they are called, what they need, how they are set.

Sources: onnxruntime's documentation of the CUDA and TensorRT execution providers, and that of the
TensorRT-RTX plug-in.
"""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch

from emag_export.errors import EngineError, InputError, MissingDependencyError

__all__ = [
    "CUDA",
    "RTX",
    "TENSORRT",
    "check_provider",
    "is_out_of_memory",
    "provider_options",
    "rtx_devices",
]

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
RTX = "NvTensorRTRTXExecutionProvider"
"""A plug-in for stock onnxruntime, from a package of its own."""

_INSTALL = {
    CUDA: 'pip uninstall onnxruntime, then pip install "onnxruntime-gpu>=1.30" (both own the same module)',
    TENSORRT: 'pip uninstall onnxruntime, then pip install onnxruntime-gpu "tensorrt>=10,<11" (both own the '
    "same module; this provider is linked to TensorRT 10 and loads no newer one)",
    RTX: "pip install onnxruntime-ep-nv-tensorrt-rtx",
}

_MINIMUM = {CUDA: (1, 30)}
"""Older versions give the memory of captured graphs to calls of other sizes: replays read what those left."""

_OUT_OF_MEMORY = ("out of memory", "failed to allocate memory", "alloc_failed", "cuda failure 2:")


def check_provider(provider: str, available: Sequence[str], version: str) -> None:
    """Refuse a provider that this onnxruntime was built without, or is too old for.

    Args:
        provider: One of the constants of this module.
        available: Of ``onnxruntime.get_available_providers()``.
        version: Of onnxruntime.

    Raises:
        InputError: If there is no such provider here.
        EngineError: With the commands that install it, also where onnxruntime is too old for it.
    """
    if provider not in _INSTALL:
        raise InputError(f"there is no provider {provider!r} for cuda; choose {', '.join(_INSTALL)}")
    if provider not in available and provider != RTX:
        raise EngineError(
            f"onnxruntime {version} here has no {provider}; it has {', '.join(available)}. "
            f"To get it: {_INSTALL[provider]}"
        )
    minimum = _MINIMUM.get(provider, (0, 0))
    if tuple(int(part) for part in version.split(".")[:2]) < minimum:
        raise EngineError(
            f"onnxruntime {version} is too old for {provider}, {minimum[0]}.{minimum[1]} or newer is needed: "
            "before, calls of other sizes overwrote the memory of captured CUDA graphs. "
            f"To get it: {_INSTALL[provider]}"
        )


def provider_options(
    provider: str, device: torch.device, stream: int, *, cuda_graphs: bool = False, tf32: bool = False
) -> dict[str, str]:
    """Options of a provider, as onnxruntime spells them.

    Args:
        provider: One of the constants of this module.
        device: With its number.
        stream: Handle of the CUDA stream that everything is launched on.
        cuda_graphs: Whether runs may be captured; the CUDA provider only, the TensorRT ones run without.
        tf32: Whether float32 products may be rounded to 10 bits; PyTorch does not by default.
    """
    options = {"device_id": str(device.index), "user_compute_stream": str(stream)}
    if provider == RTX:
        return {**options, "has_user_compute_stream": "1"}  # the others conclude that themselves
    if provider == TENSORRT:
        return options
    return {
        **options,
        # Powers of two would take up to twice the memory needed from PyTorch, which shares the device.
        "arena_extend_strategy": "kSameAsRequested",
        # The default tries every algorithm for every new shape, for seconds.
        "cudnn_conv_algo_search": "HEURISTIC",
        "use_tf32": str(int(tf32)),
        "enable_cuda_graph": str(int(cuda_graphs)),
    }


def rtx_devices(ort: Any, device: torch.device) -> list[Any]:
    """Handle of a GPU for ``SessionOptions.add_provider_for_devices``.

    Raises:
        MissingDependencyError: If the plug-in is not installed.
        EngineError: If it does not run on this GPU.
    """
    try:
        plugin: Any = import_module("onnxruntime_ep_nv_tensorrt_rtx")
    except ImportError as error:
        raise MissingDependencyError(f"the plug-in {RTX} is not installed: {_INSTALL[RTX]}") from error
    name = plugin.get_ep_name()
    if not any(found.ep_name == name for found in ort.get_ep_devices()):
        ort.register_execution_provider_library(name, plugin.get_library_path())
    devices = [found for found in ort.get_ep_devices() if found.ep_name == name]
    if device.index >= len(devices):
        raise EngineError(
            f"{RTX} runs on {len(devices)} GPUs here and {device} is not among them; it needs an RTX GPU, "
            f"otherwise take {CUDA}"
        )
    return [devices[device.index]]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether onnxruntime or PyTorch gave up for want of device memory; onnxruntime only says so in words."""
    said = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or any(words in said for words in _OUT_OF_MEMORY)
