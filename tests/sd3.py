"""Conditioning of SD3 from its tensors, for tests that make their own."""

from torch import Tensor

from emag_export.runtime.sampling.conditioning import Conditioning

EMBEDS, POOLED = "encoder_hidden_states", "pooled_projections"


def conditioning(
    embeds: Tensor,
    pooled: Tensor,
    negative_embeds: Tensor | None = None,
    negative_pooled: Tensor | None = None,
) -> Conditioning:
    """With a negative prompt where both of its tensors are given."""
    negative = None
    if negative_embeds is not None and negative_pooled is not None:
        negative = {EMBEDS: negative_embeds, POOLED: negative_pooled}
    return Conditioning(given={EMBEDS: embeds, POOLED: pooled}, negative=negative)
