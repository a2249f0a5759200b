"""What Qwen-Image takes of a prompt: hidden states of a language model asked to describe a picture."""

import torch
from torch.nn.functional import pad

from emag_export.families.qwen_image.components import TEMPLATE_TOKENS, TEXT
from emag_export.families.texts import Cut, Encoded, Texts

__all__ = ["AFTER", "BEFORE", "encode"]

BEFORE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
"""In front of every prompt: :data:`TEMPLATE_TOKENS` tokens, whose states are dropped."""

AFTER = "<|im_end|>\n<|im_start|>assistant\n"
"""Behind it; its states are kept."""


def encode(prompt: str, texts: Texts) -> Encoded:
    """Embed one prompt, filled up to ``texts.max_sequence_length`` with zeros that a mask hides.

    Args:
        prompt: Any text; what is too long is cut, and named.
        texts: The bundle's text encoder.

    Source:
        ``QwenImagePipeline.encode_prompt`` of diffusers, whose result this equals up to the filling.
    """
    text, limit = f"{BEFORE}{prompt}{AFTER}", TEMPLATE_TOKENS + texts.max_sequence_length
    count = min(texts.length(TEXT.name, text), limit)
    tokens, beyond = texts.tokens(TEXT.name, text, limit)
    states = texts.run(TEXT.name, tokens[:, :count])["last_hidden_state"][:, TEMPLATE_TOKENS:]
    mask = torch.ones(1, states.shape[1], dtype=torch.int64, device=states.device)
    return Encoded(
        tensors={
            "encoder_hidden_states": pad(states, (0, 0, 0, limit - count)),
            "encoder_hidden_states_mask": pad(mask, (0, limit - count)),
        },
        cut=(Cut(unseen={TEXT.label: _of_prompt(beyond)}),),
    )


def _of_prompt(beyond: str) -> str:
    """What of the text that did not fit is the prompt's."""
    after = AFTER.strip()
    return "" if after.endswith(beyond) else beyond.removesuffix(after).strip()
