"""The unmodified diffusers model of Z-Image, as its own pipeline calls it: for the reference."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from emag_export.families.unmodified import image_tokens

__all__ = ["STREAMS", "attention_blocks", "image_tokens", "predict"]

STREAMS = ("x",)
"""Parameters of a block that it returns changed, in the order in which it returns them."""


def predict(
    model: Any,
    latents: Float[Tensor, "rows channels height width"],
    timestep: Float[Tensor, " rows"],
    conditioning: Mapping[str, Tensor],
) -> Float[Tensor, "rows channels height width"]:
    """The velocity of every row, which is the negative of what the model predicts.

    Args:
        model: The diffusers transformer.
        latents: In the model's dtype.
        timestep: Of the scheduler.
        conditioning: Captions and their mask; the model gets the tokens that are real.
    """
    lengths = conditioning["encoder_hidden_states_mask"].sum(dim=1).tolist()
    captions = [
        row[:length] for row, length in zip(conditioning["encoder_hidden_states"], lengths, strict=True)
    ]
    frames = list(latents.unsqueeze(2).unbind(dim=0))
    predicted = model(frames, (1000 - timestep) / 1000, captions, return_dict=False)[0]
    return -torch.stack(predicted).squeeze(2)


def attention_blocks(model: Any) -> list[Any]:
    """The modules that the contract counts as blocks: the trunk, without the refiners."""
    return list(model.layers)
