"""Devices: what they are called, and moving what the host made there without waiting for it."""

import platform
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["device_name", "processor_name", "to_device"]


def processor_name() -> str:
    """Of the CPU, as the system calls it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text("utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """Of the GPU, or of the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()


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
