"""The unmodified diffusers model of SD3, as its own pipeline calls it: the reference's half of the family."""

from emag_export.families.unmodified import attention_blocks, image_tokens, predict

__all__ = ["STREAMS", "attention_blocks", "image_tokens", "predict"]

STREAMS = ("encoder_hidden_states", "hidden_states")
"""Parameters of a block that it returns changed, in the order in which it returns them."""
