"""CFG-Zero* (arXiv:2503.18886): an optimised scale of the unconditional prediction."""

from jaxtyping import Float
from torch import Tensor

__all__ = ["optimised_scale"]

Rows = Float[Tensor, "images channels *sides"]


def optimised_scale(cond: Rows, uncond: Rows) -> Float[Tensor, "images ..."]:
    r"""The factor that brings ``uncond`` closest to ``cond``: :math:`s^* = \langle c, u\rangle/\|u\|^2`.

    The other half of the algorithm, a prediction of 0 in the first steps, needs no function: see
    :attr:`~emag_export.runtime.guidance.rules.GuidanceRule.zeroed`.

    Args:
        cond: Prediction given the prompt.
        uncond: Prediction without it, same units.

    Returns:
        One number per image, with as many axes as the predictions; 0 where ``uncond`` is 0.

    Examples:
        >>> import torch
        >>> from emag_export.runtime.guidance.zero_star import optimised_scale
        >>> c = torch.randn(1, 4, 8, 8)
        >>> optimised_scale(c, 0.5 * c).flatten()
        tensor([2.])

    Source:
        arXiv:2503.18886, algorithm 1; the products are sums over all numbers of an image.
    """
    dims = tuple(range(1, cond.ndim))
    product = (cond * uncond).sum(dim=dims, keepdim=True)
    return product / uncond.square().sum(dim=dims, keepdim=True).clamp_min(1e-12)
