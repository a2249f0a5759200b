"""The environment with onnxruntime-gpu, which owns the same module as the project's own onnxruntime."""

import subprocess
import sys
from pathlib import Path

from emag_export.errors import MissingDependencyError
from emag_export.hashing import hash_files

__all__ = ["make_environment", "provider_library"]

_HERE = Path(__file__).parent
_ROOT = _HERE.parent.parent
_PINS = (_HERE / "requirements.txt", _ROOT / "constraints.txt")


def make_environment(folder: Path) -> Path:
    """Install onnxruntime-gpu into a virtual environment (a download of 256 MB), or find it there.

    Args:
        folder: Of the environment.

    Returns:
        Its Python.

    Raises:
        MissingDependencyError: If the installation fails.
    """
    python, stamp = folder / "bin" / "python", folder / "installed.sha256"
    pins = hash_files(_ROOT, _PINS)
    if stamp.exists() and stamp.read_text("utf-8") == pins:
        return python
    requirements, constraints = map(str, _PINS)
    install = ("-m", "pip", "install", "--disable-pip-version-check", "--quiet")
    try:
        subprocess.run((sys.executable, "-m", "venv", "--clear", str(folder)), check=True)
        subprocess.run((str(python), *install, "-r", requirements, "-c", constraints), check=True)
    except subprocess.CalledProcessError as error:
        raise MissingDependencyError(
            f"onnxruntime-gpu could not be installed into {folder}: {error}; check the network and the disk, "
            "then call again"
        ) from error
    stamp.write_text(pins, "utf-8")
    return python


def provider_library(environment: Path) -> Path:
    """The CUDA provider in the environment that :func:`make_environment` made."""
    (library,) = environment.glob(
        "lib/python*/site-packages/onnxruntime/capi/libonnxruntime_providers_cuda.so"
    )
    return library
