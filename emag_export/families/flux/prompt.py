"""What Flux.1's denoiser takes of a prompt: one vector of CLIP, and T5's states."""

from emag_export.families.flux.components import CLIP, T5
from emag_export.families.texts import Cut, Encoded, Texts

__all__ = ["encode"]


def encode(prompt: str, texts: Texts) -> Encoded:
    """Embed one prompt.

    Args:
        prompt: Any text; what is too long is cut, and named.
        texts: The bundle's text encoders.

    Source:
        ``FluxPipeline.encode_prompt`` of diffusers, whose result this equals.
    """
    clip_tokens, clip_unseen = texts.tokens(CLIP.name, prompt)
    t5_tokens, t5_unseen = texts.tokens(T5.name, prompt, texts.max_sequence_length)
    return Encoded(
        tensors={
            "encoder_hidden_states": texts.run(T5.name, t5_tokens)["last_hidden_state"],
            "pooled_projections": texts.run(CLIP.name, clip_tokens)["pooler_output"],
        },
        cut=(Cut(unseen={CLIP.label: clip_unseen, T5.label: t5_unseen}),),
    )
