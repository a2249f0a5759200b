"""Packages that only part of the work needs, and the extra of this project that brings each."""

from collections.abc import Mapping
from importlib.util import find_spec
from types import MappingProxyType

from emag_export.errors import MissingDependencyError

__all__ = ["EXTRAS", "install_command", "require_packages"]

EXTRAS: Mapping[str, str] = MappingProxyType(
    {
        "accelerate": "export",
        "onnx": "export",
        "onnxscript": "export",
        "onnxruntime": "cpu",
        "matplotlib": "report",
        "skimage": "report",
        "polygraphy": "tensorrt-rtx",
        "fastapi": "serve",
        "uvicorn": "serve",
        "prometheus_client": "serve",
        "pyarrow": "serve",
        "ray": "ray",
    }
)
"""Module to extra. onnxruntime comes with ``gpu`` as well, built for NVIDIA GPUs: take one of the two."""


def install_command(*extras: str) -> str:
    """What to type for these extras."""
    return f'pip install "emag-export[{",".join(extras)}]"'


def require_packages(*modules: str, purpose: str) -> None:
    """Refuse work that would stop halfway for want of a package. Nothing is imported.

    Args:
        *modules: Keys of :data:`EXTRAS`.
        purpose: What needs them, for the error: ``"exporting"``.

    Raises:
        MissingDependencyError: Naming all that are absent, with one pip command for them.
    """
    absent = [module for module in modules if find_spec(module) is None]
    if absent:
        extras = dict.fromkeys(EXTRAS[module] for module in absent)
        gpu = ", or gpu in place of cpu for an NVIDIA GPU" if "cpu" in extras else ""
        raise MissingDependencyError(
            f"{purpose} needs {' and '.join(absent)}: {install_command(*extras)}{gpu}"
        )
