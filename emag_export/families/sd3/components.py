"""Text encoders of SD3: two CLIPs and a T5, which may be left out. Nothing here needs torch."""

from emag_export.families.text_encoders import clip, t5

__all__ = ["CLIP_G", "CLIP_L", "T5"]

CLIP_L = clip("text_encoder", "tokenizer")
CLIP_G = clip("text_encoder_2", "tokenizer_2")

T5 = t5("text_encoder_3", "tokenizer_3", optional="t5")
"""Zeros stand in its place where it is left out, as in diffusers."""
