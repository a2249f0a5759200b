"""Rescaled classifier-free guidance (arXiv:2305.08891)."""

from jaxtyping import Float
from torch import Tensor

from emag_export.runtime.guidance.clean import Number

__all__ = ["rescale"]

Rows = Float[Tensor, "images channels *sides"]


def rescale(guided: Rows, cond: Rows, phi: Number) -> Rows:
    r"""Bring the guided prediction back to the spread of the conditional one.

    :math:`g\,(\phi\,\mathrm{std}(c)/\mathrm{std}(g) + 1 - \phi)`.

    Args:
        guided: :math:`g`, the result of a rule of guidance.
        cond: :math:`c`, prediction given the prompt, as the model made it, same units.
        phi: How much of it, 0 to 1; 0 returns ``guided``.

    Returns:
        The guided prediction with its new spread, same units.

    Examples:
        >>> import torch
        >>> from emag_export.runtime.guidance.rescale import rescale
        >>> c = torch.randn(1, 4, 8, 8)
        >>> torch.allclose(rescale(3 * c, c, 1.0), c, atol=1e-5)
        True

    Source:
        arXiv:2305.08891, eqs. 15 and 16; standard deviations over all numbers of an image.
    """
    dims = tuple(range(1, cond.ndim))
    spread = cond.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True).clamp_min(1e-12)
    return guided * (phi * spread + (1 - phi))
