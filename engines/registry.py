"""Backends by name: which engine opens a component of a bundle."""

from collections.abc import Callable

from emag_export.bundle import Bundle
from emag_export.engines.ort import OnnxRuntimeEngine, OrtOptions
from emag_export.engines.protocol import Engine
from emag_export.errors import InputError

__all__ = ["BACKENDS", "open_backend"]

BACKENDS = ("onnxruntime", "torch")
"""``torch`` needs the source model and is opened where that is at hand: by ``emag_export.reference``."""


def open_backend(name: str, *, device: str = "cpu", threads: int = 0) -> Callable[[Bundle, str], Engine]:
    """A function that opens components of a bundle on this backend.

    Args:
        name: One of :data:`BACKENDS` that needs nothing but the bundle.
        device: ``cpu`` or ``cuda``.
        threads: CPU threads; 0 lets the backend choose.

    Raises:
        InputError: If there is no such backend.
    """
    if name != "onnxruntime":
        raise InputError(f"there is no backend {name!r} that runs a bundle; choose onnxruntime")
    options = OrtOptions(device=device, threads=threads)
    return lambda bundle, component: OnnxRuntimeEngine(bundle.graph(component), bundle.spec(component), options)
