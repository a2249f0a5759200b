"""Tangential damping classifier-free guidance, TCFG (arXiv:2503.18137)."""

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["tangential"]

Rows = Float[Tensor, "images channels *sides"]


def tangential(cond: Rows, uncond: Rows) -> Rows:
    r"""Keep of the unconditional prediction what lies along the direction that both predictions share.

    :math:`u' = \langle u, v_1\rangle\,v_1`, with :math:`v_1` the first right singular vector of the matrix
    that has the rows :math:`c` and :math:`u`. It is a combination of the two, whose weights are the first
    eigenvector :math:`(\cos\theta, \sin\theta)` of their Gram matrix, :math:`\tan 2\theta = 2\langle c,
    u\rangle/(\|c\|^2 - \|u\|^2)`. That gives
    :math:`u' = \sin\theta\,(\cos\theta\;c + \sin\theta\;u)` without a decomposition, for which a GPU would
    make the host wait. The angle is computed in float64.

    Args:
        cond: Prediction given the prompt.
        uncond: Prediction without it, same units.

    Returns:
        The damped unconditional prediction. Where neither direction comes first, as for orthogonal
            predictions of one length, it is half of ``uncond``.

    Examples:
        >>> import torch
        >>> from emag_export.runtime.guidance.tangential import tangential
        >>> c = torch.randn(1, 4, 8, 8)
        >>> torch.allclose(tangential(c, 0.5 * c), 0.5 * c, atol=1e-6)  # along c already: nothing is dropped
        True

    Source:
        arXiv:2503.18137, algorithm 1, image by image.
    """
    dims = tuple(range(1, cond.ndim))
    c, u = cond.double(), uncond.double()
    difference = (c.square() - u.square()).sum(dim=dims, keepdim=True)
    product = 2 * (c * u).sum(dim=dims, keepdim=True)
    length = torch.hypot(difference, product).clamp_min(1e-30)
    of_cond, of_uncond = product / length / 2, (1 - difference / length) / 2
    return (of_cond * c + of_uncond * u).to(uncond.dtype)
