"""The unmodified diffusers model of DiT, as its own pipeline calls it: the reference's half of the family."""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor

__all__ = ["STREAMS", "attention_blocks", "image_tokens", "predict"]

STREAMS = ("hidden_states",)
"""Parameters of a block that it returns changed, in the order in which it returns them."""


def predict(
    model: Any,
    latents: Float[Tensor, "rows channels height width"],
    timestep: Float[Tensor, " rows"],
    conditioning: Mapping[str, Tensor],
) -> Float[Tensor, "rows out_channels height width"]:
    """Epsilon of every row, and behind it the variance where the model learned one.

    Args:
        model: ``DiTTransformer2DModel``.
        latents: In the model's dtype.
        timestep: Of the scheduler.
        conditioning: ``class_labels``.
    """
    prediction: Tensor = model(hidden_states=latents, timestep=timestep, return_dict=False, **conditioning)[0]
    return prediction


def attention_blocks(model: Any) -> list[Any]:
    """The modules that the contract counts as blocks."""
    return list(model.transformer_blocks)


def image_tokens(count: int) -> slice:
    """Where the image tokens are: there are no others."""
    return slice(0, count)
