"""Which TensorRT, if any, builds engines for this machine's GPU without being asked for by name."""

from importlib.util import find_spec
from pathlib import Path

from emag_export.engines.tensorrt.flavour import FLAVOURS, Flavour
from emag_export.errors import EmagError

__all__ = ["has_nvidia_gpu", "usable_flavour"]

_DEVICES = Path("/dev")


def has_nvidia_gpu() -> bool:
    """Whether the system shows an NVIDIA GPU; nothing is loaded to find out.

    Native Linux has ``nvidia0`` and so on, the Windows subsystem ``dxg``.
    """
    return any(_DEVICES.glob("nvidia[0-9]*")) or (_DEVICES / "dxg").exists()


def usable_flavour() -> tuple[Flavour | None, str]:
    """The first module that is installed and accepts this machine's GPU, TensorRT before TensorRT-RTX.

    Returns:
        The flavour, and why there is none otherwise.
    """
    if not has_nvidia_gpu():
        return None, "this machine shows no NVIDIA GPU"
    reasons = []
    for flavour in FLAVOURS.values():
        if find_spec(flavour.module) is None or find_spec("polygraphy") is None:
            reasons.append(f"{flavour.backend} is not installed")
            continue
        # Only now: both load libraries.
        from emag_export.engines.tensorrt.gpu import current_gpu
        from emag_export.engines.tensorrt.probe import probe

        try:
            current_gpu(flavour)
            probe(flavour)
        except EmagError as error:
            reasons.append(error.message)
            continue
        return flavour, ""
    return None, "; ".join(reasons)
