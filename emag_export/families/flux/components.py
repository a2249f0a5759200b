"""Text encoders of Flux.1: CLIP for one vector, T5 for the sequence. Nothing here needs torch."""

from emag_export.families.text_encoders import clip, t5

__all__ = ["CLIP", "T5"]

CLIP = clip("text_encoder", "tokenizer", projected=False)
T5 = t5("text_encoder_2", "tokenizer_2")
