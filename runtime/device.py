"""Moving what the host made to where the engine runs, without waiting for it."""

import torch
from torch import Tensor

__all__ = ["to_device"]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on ``device``, in the order of the current stream.

    A copy from ordinary memory makes the host wait until the device has done all it was given before;
    a copy from pinned memory does not.

    Args:
        tensor: On the host; nobody may write to it afterwards.
        device: Where it is needed.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
