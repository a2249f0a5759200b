"""The GPU that PyTorch sees, or why it sees none."""

import warnings

import torch

from emag_export.errors import EngineError

__all__ = ["check_gpu", "why_no_gpu"]


def why_no_gpu() -> str | None:
    """The reason, and what to do about it, in words for an error; None where PyTorch sees a GPU."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return None
    if torch.version.cuda is None:
        return "this PyTorch is a build without CUDA; install one with it: https://pytorch.org/get-started"
    return next((str(warning.message) for warning in said), "check the driver with: nvidia-smi")


def check_gpu(device: torch.device) -> torch.device:
    """The GPU that is meant, with its number.

    Args:
        device: ``cuda``, the current one, or ``cuda:1``.

    Raises:
        EngineError: If PyTorch, which owns all memory here, does not see it.
    """
    if (reason := why_no_gpu()) is not None:
        raise EngineError(
            f"{device} was asked for, but PyTorch {torch.__version__} sees no GPU: {reason}. Without one, "
            "run with `device` cpu"
        )
    index, count = device.index, torch.cuda.device_count()
    index = torch.cuda.current_device() if index is None else index
    if index >= count:
        raise EngineError(f"{device} was asked for, this machine has cuda:0 to cuda:{count - 1}; take one")
    return torch.device("cuda", index)
