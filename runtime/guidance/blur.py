"""Blur matrices of the negative ``blur-query``: a Gaussian over a line of image tokens."""

import math
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from emag_export.runtime.device import to_device

__all__ = ["blur_matrix"]


@lru_cache(maxsize=256)
def blur_matrix(size: int, sigma: float, device: torch.device) -> Float[Tensor, "size size"]:
    """What a line of ``size`` image tokens is multiplied by from the left to be blurred.

    Remembered, as every step of a run takes the same two.

    Args:
        size: Image tokens along the side.
        sigma: Standard deviation in image tokens; infinity gives the mean of the line, 0 the line itself.
        device: Where the engine runs.

    Returns:
        float32; every row sums to 1.

    Examples:
        >>> import math, torch
        >>> from emag_export.runtime.guidance.blur import blur_matrix
        >>> blur_matrix(4, math.inf, torch.device("cpu"))[0]
        tensor([0.2500, 0.2500, 0.2500, 0.2500])

    Source:
        arXiv:2408.00760 and its code: ``ceil(6 sigma)`` taps, one more if that is even, reflected at the
        border without repeating the edge. The reflection goes back and forth where the kernel is longer than
        the line.
    """
    if math.isinf(sigma):
        return torch.full((size, size), 1 / size, device=device)
    if sigma == 0 or size == 1:
        return torch.eye(size, device=device)
    half = math.ceil(6 * sigma) // 2  # on either side; the odd number of taps has the tap in the middle
    offsets = torch.arange(-half, half + 1)
    kernel = torch.exp(-(offsets.double() ** 2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    period = 2 * (size - 1)
    sources = (torch.arange(size)[:, None] + offsets) % period
    sources = torch.where(sources < size, sources, period - sources)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    matrix.scatter_add_(1, sources, kernel.expand(size, -1))
    return to_device(matrix.float(), device)
