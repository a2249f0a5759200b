"""Backends by name: which engine opens a component of a bundle."""

from collections.abc import Callable

from emag_export.bundle import Bundle
from emag_export.engines.ort import OnnxRuntimeEngine, OrtOptions
from emag_export.engines.protocol import Engine
from emag_export.errors import InputError

__all__ = ["BACKENDS", "open_backend"]

BACKENDS = ("onnxruntime",)
"""Backends that need nothing but the bundle."""


def open_backend(name: str, *, device: str = "cpu", threads: int = 0) -> Callable[[Bundle, str], Engine]:
    """A function that opens components of a bundle on this backend.

    Args:
        name: One of :data:`BACKENDS`.
        device: ``cpu`` or ``cuda``.
        threads: CPU threads; 0 lets the backend choose.

    Raises:
        InputError: If there is no such backend.
    """
    if name not in BACKENDS:
        raise InputError(f"there is no backend {name!r}; choose {', '.join(BACKENDS)}")
    options = OrtOptions(device=device, threads=threads)
    return lambda bundle, component: OnnxRuntimeEngine(
        bundle.graph(component), bundle.spec(component), options
    )
