"""What SD3's denoiser takes of a prompt: CLIP, CLIP and, where present, T5, as it was trained."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from emag_export.families.sd3.components import CLIP_G, CLIP_L, T5
from emag_export.families.texts import Cut, Encoded, Texts

__all__ = ["encode"]


def encode(prompt: str, texts: Texts) -> Encoded:
    """Embed one prompt.

    Args:
        prompt: Any text; what is too long is cut, and named.
        texts: The bundle's text encoders.

    Source:
        ``StableDiffusion3Pipeline.encode_prompt`` of diffusers, whose result this equals.
    """
    width = int(texts.contract.conditioning[0].dims[-1])
    states, pooled, unseen = [], [], ""
    for component in (CLIP_L, CLIP_G):
        tokens, unseen = texts.tokens(component.name, prompt)
        output = texts.run(component.name, tokens)
        states.append(output["penultimate_hidden_state"])
        pooled.append(output["text_embeds"])
    clip = torch.cat(states, dim=-1)
    clip = pad(clip, (0, width - clip.shape[-1]))
    t5, cut = _t5(prompt, texts, clip)
    return Encoded(
        tensors={
            "encoder_hidden_states": torch.cat([clip, t5], dim=1),
            "pooled_projections": torch.cat(pooled, dim=-1),
        },
        cut=(Cut(unseen={CLIP_L.label: unseen, **cut}),),
    )


def _t5(prompt: str, texts: Texts, like: Tensor) -> tuple[Tensor, dict[str, str]]:
    """T5's states, or zeros, and what it did not see."""
    length = texts.max_sequence_length
    if not texts.has(T5.name):
        return like.new_zeros(1, length, like.shape[-1]), {}
    tokens, unseen = texts.tokens(T5.name, prompt, length)
    return texts.run(T5.name, tokens)["last_hidden_state"].to(like.dtype), {T5.label: unseen}
