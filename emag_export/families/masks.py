"""Padding behind a mask: what a family with texts of different lengths makes of the mask of its prompts.

A conditioning tensor ``NAME_mask``, [trunk_rows, text], says which tokens of ``NAME`` are real; see
:attr:`~emag_export.contract.TensorSpec.is_mask`. Nothing attends to the others, so what they hold does not
matter.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["hide_padding", "random_mask"]


def hide_padding(
    mask: Int[Tensor, "rows text"], dtype: torch.dtype, image_tokens: int | torch.SymInt = 0
) -> Float[Tensor, "rows 1 1 tokens"]:
    """What is added to the scores of an attention over text, or over image tokens and text behind them.

    Args:
        mask: 1 where a token of the text is real.
        dtype: Of the scores.
        image_tokens: Keys in front of the text, which every row sees.
    """
    seen = mask
    if not isinstance(image_tokens, int) or image_tokens > 0:
        seen = torch.cat([mask.new_ones(mask.shape[0], image_tokens), mask], dim=1)
    return torch.where(seen[:, None, None] > 0, 0.0, -torch.inf).to(dtype)


def random_mask(shape: Sequence[int], generator: torch.Generator) -> Int[Tensor, "*rows tokens"]:
    """Prefixes of any length, of at least one token."""
    lengths = torch.randint(1, shape[-1] + 1, (*shape[:-1], 1), generator=generator)
    return (torch.arange(shape[-1]) < lengths).long()
