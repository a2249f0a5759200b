"""How most pipelines call their unmodified diffusers model: what oracles of families have in common."""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor

__all__ = ["attention_blocks", "image_tokens", "latents_size", "predict"]


def predict(
    model: Any,
    latents: Float[Tensor, "rows channels height width"],
    timestep: Float[Tensor, " rows"],
    conditioning: Mapping[str, Tensor],
) -> Float[Tensor, "rows out_channels height width"]:
    """What the model predicts of every row, and behind it the variance where it learned one.

    Args:
        model: The diffusers transformer.
        latents: In the model's dtype.
        timestep: Of the scheduler.
        conditioning: By name; numbers that are not whole in the model's dtype.
    """
    prediction: Tensor = model(hidden_states=latents, timestep=timestep, return_dict=False, **conditioning)[0]
    return prediction


def attention_blocks(model: Any) -> list[Any]:
    """The modules that the contract counts as blocks. The first attention in each is the tracked one."""
    return list(model.transformer_blocks)


def image_tokens(count: int) -> slice:
    """Where the image tokens are in diffusers' own sequence: first, in front of text where there is some."""
    return slice(0, count)


def latents_size(inputs: Mapping[str, Any]) -> tuple[int, ...]:
    """Size of the latents behind the rows, as the contract names it, of one call of the model.

    Args:
        inputs: By name in the model's ``forward``.
    """
    return tuple(inputs["hidden_states"].shape[1:])
