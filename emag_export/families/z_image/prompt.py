"""What Z-Image's denoiser takes of a prompt: Qwen3's states of a message that says it."""

import torch
from torch.nn.functional import pad

from emag_export.families.texts import Cut, Encoded, Texts
from emag_export.families.z_image.components import QWEN3

__all__ = ["encode"]


def encode(prompt: str, texts: Texts) -> Encoded:
    """Embed one prompt, filled up with zeros behind a mask: texts of all lengths fit into one call.

    Args:
        prompt: Any text; what is too long is cut, and named.
        texts: The bundle's text encoder.

    Source:
        ``ZImagePipeline.encode_prompt`` of diffusers, whose result the tokens behind the mask equal.
    """
    tokens, unseen = texts.message(QWEN3.name, prompt, texts.max_sequence_length)
    hidden = texts.run(QWEN3.name, tokens)["penultimate_hidden_state"]
    length, multiple = hidden.shape[1], texts.contract.multiples["text"]
    whole = -(-texts.max_sequence_length // multiple) * multiple
    mask = (torch.arange(whole, device=hidden.device) < length).long()[None]
    return Encoded(
        tensors={
            "encoder_hidden_states": pad(hidden, (0, 0, 0, whole - length)),
            "encoder_hidden_states_mask": mask,
        },
        cut=(Cut(unseen={QWEN3.label: unseen}),),
    )
