"""The length of every image token of a prediction, kept through guidance."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

__all__ = ["keep_norm"]

Rows = Float[Tensor, "images channels *sides"]


def keep_norm(guided: Rows, cond: Rows, patch: Sequence[int]) -> Rows:
    r"""Give every image token of the guided prediction the length that it has in the conditional one.

    :math:`g_i\,\lVert c_i\rVert / \lVert g_i\rVert`, where :math:`g_i` are all channels of the latents that
    the token stands for.

    Args:
        guided: :math:`g`, the result of a rule of guidance.
        cond: :math:`c`, prediction given the prompt, as the model made it.
        patch: Latents of a token along every side.

    Returns:
        The guided prediction, every token of it scaled.

    Examples:
        >>> import torch
        >>> from emag_export.runtime.guidance.norm import keep_norm
        >>> c = torch.randn(1, 4, 8, 8)
        >>> torch.allclose(keep_norm(3 * c, c, patch=(2, 2)), c, atol=1e-5)
        True

    Source:
        diffusers' ``QwenImagePipeline``, behind ``true_cfg_scale``; there tokens are packed 2 x 2.
    """
    return guided * (_norms(cond, patch) / _norms(guided, patch).clamp_min(1e-12))


def _norms(prediction: Rows, patch: Sequence[int]) -> Float[Tensor, "images 1 *sides"]:
    """Of the token that each number belongs to."""
    norms = prediction.square().sum(dim=1)
    for axis, side in enumerate(patch, start=1):
        norms = norms.unflatten(axis, (-1, side)).sum(dim=axis + 1)
    for axis, side in enumerate(patch, start=1):
        norms = norms.repeat_interleave(side, dim=axis)
    return norms.sqrt().unsqueeze(1)
