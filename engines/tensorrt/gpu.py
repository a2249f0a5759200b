"""The GPU of this machine, as far as building and running engines cares."""

import re
from dataclasses import dataclass

from emag_export.engines.tensorrt.flavour import Flavour
from emag_export.errors import EngineError

__all__ = ["Gpu", "current_gpu", "require_memory"]


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """What PyTorch says of the device it would use."""

    name: str
    capability: tuple[int, int]
    total: int
    """Bytes."""
    free: int

    @property
    def target(self) -> str:
        """Its compute capability as a build target: ``sm89``."""
        return f"sm{self.capability[0]}{self.capability[1]}"

    @property
    def slug(self) -> str:
        """Its name, fit for a folder."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


def current_gpu(flavour: Flavour, *, instead: str = "use `backend` onnxruntime") -> Gpu:
    """The GPU that engines of ``flavour`` would run on.

    Args:
        flavour: Which module.
        instead: What to do without a GPU, for the error.

    Raises:
        EngineError: If there is none, the driver is too old, or the module does not run on it.
    """
    import torch

    from emag_export.engines.cuda_device import why_no_gpu

    if (reason := why_no_gpu()) is not None:
        raise EngineError(
            f"{flavour.backend} needs an NVIDIA GPU and PyTorch sees none: {reason}. Without a GPU, {instead}"
        )
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    free, total = torch.cuda.mem_get_info()
    gpu = Gpu(name=properties.name, capability=(properties.major, properties.minor), total=total, free=free)
    flavour.check_gpu(gpu.name, gpu.capability)
    return gpu


def require_memory(gpu: Gpu, need: int, what: str) -> None:
    """Refuse before the work begins.

    Args:
        gpu: With its free memory.
        need: Bytes.
        what: Needs them, for the error.

    Raises:
        EngineError: Naming the parameters that help.
    """
    if need > gpu.free:
        raise EngineError(
            f"{what} needs about {need / 1e9:.1f} GB of device memory, {gpu.name} has "
            f"{gpu.free / 1e9:.1f} GB free; lower `max_images`, `height_range` and `width_range`, "
            "or build with `weight_streaming`"
        )
