r"""Train on one zero row of text as if there were many of them, exactly.

Without a third text encoder, diffusers' SD3 pipeline appends ``max_sequence_length`` (256 by default) rows of
zeros to the text. They carry no position, so they enter the first block equal, leave it equal, and so on: 256
keys with equal values weigh in attention as one whose score is :math:`\log 256` higher. One row with
that bias gives the same output as 256 rows at a quarter of the cost, and drawing the count at random makes
the model indifferent to it.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from jaxtyping import Float
from torch import Tensor

PAD_COUNTS: tuple[int, ...] = (0, 20, 77, 256, 256)
"""Numbers of zero rows seen in training; the last is the pipeline's default and comes twice as often."""

Image = Float[Tensor, "rows image width"]
Text = Float[Tensor, "rows text width"]


class PadBiasAttention:
    """SD3's joint attention, with the score of the last text key raised by the logarithm of a count."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Image,
        encoder_hidden_states: Text,
        attention_mask: Tensor | None = None,
        pads: Float[Tensor, " rows"] | None = None,
        **_: Any,
    ) -> tuple[Image, Text]:
        """Attend over image and text together.

        Args:
            attn: The module that owns the projections.
            hidden_states: Image tokens.
            encoder_hidden_states: Text tokens, the last one a zero row.
            attention_mask: Unused; here because diffusers passes it.
            pads: How many zero rows the last one stands for; None means one.

        Returns:
            Image tokens and text tokens after attention.

        Source:
            ``JointAttnProcessor2_0`` of diffusers 0.42, which this equals when ``pads`` is None.
        """
        image = _heads(attn, hidden_states, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k))
        added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        text = _heads(attn, encoder_hidden_states, added, (attn.norm_added_q, attn.norm_added_k))
        query, key, value = (torch.cat(pair, dim=2) for pair in zip(image, text, strict=True))
        score = query @ key.transpose(2, 3) * query.shape[3] ** -0.5
        if pads is not None:
            bias = score.new_zeros(len(pads), 1, 1, key.shape[2])
            bias[:, 0, 0, -1] = pads.log().to(bias.dtype)
            score = score + bias
        # Written out: the backward pass of torch's fused attention is 8 times slower at 85 tokens on a CPU.
        mixed = score.softmax(dim=-1).to(value.dtype) @ value
        mixed = mixed.transpose(1, 2).flatten(2)
        split = hidden_states.shape[1]
        image_out: Image = attn.to_out[0](mixed[:, :split])
        text_out = mixed[:, split:]
        return image_out, text_out if attn.context_pre_only else attn.to_add_out(text_out)


def _heads(
    attn: Attention, tokens: Tensor, projections: tuple[Any, ...], norms: tuple[Any, ...]
) -> list[Tensor]:
    """Project tokens, rows x tokens x width, to query, key and value, rows x heads x tokens x head width."""
    query, key, value = (
        project(tokens).unflatten(2, (attn.heads, -1)).transpose(1, 2) for project in projections
    )
    query = query if norms[0] is None else norms[0](query)
    key = key if norms[1] is None else norms[1](key)
    return [query.to(value.dtype), key.to(value.dtype), value]
