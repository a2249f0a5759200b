"""The unmodified diffusers model of Flux.1, as its own pipeline calls it."""

from collections.abc import Mapping
from typing import Any

from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from jaxtyping import Float
from torch import Tensor

__all__ = [
    "PIPELINE_ATTRIBUTES",
    "SEPARATE_CALLS",
    "STREAMS",
    "attention_blocks",
    "cond_rows",
    "image_tokens",
    "latents_size",
    "predict",
]

STREAMS = ("encoder_hidden_states", "hidden_states")
"""Parameters of a block that it returns changed, in the order in which it returns them."""

PIPELINE_ATTRIBUTES = ("transformer", "scheduler")
"""What guidance inside the pipeline reads of it."""

SEPARATE_CALLS = True
"""With true CFG the pipeline calls the model twice in a step, first with the prompt."""

_TRAINING_STEPS = 1000
"""The model takes the scheduler's timestep in these units."""


def predict(
    model: Any,
    latents: Float[Tensor, "rows channels height width"],
    timestep: Float[Tensor, " rows"],
    conditioning: Mapping[str, Tensor],
) -> Float[Tensor, "rows out_channels height width"]:
    """The velocity of every row.

    Args:
        model: The diffusers transformer.
        latents: In the model's dtype.
        timestep: Of the scheduler.
        conditioning: By name, in the model's dtype.
    """
    rows, channels, height, width = latents.shape
    text = conditioning["encoder_hidden_states"]
    packed: Tensor = model(
        hidden_states=FluxPipeline._pack_latents(latents, rows, channels, height, width),
        timestep=timestep / _TRAINING_STEPS,
        img_ids=FluxPipeline._prepare_latent_image_ids(
            rows, height // 2, width // 2, latents.device, latents.dtype
        ),
        txt_ids=text.new_zeros(text.shape[1], 3),
        return_dict=False,
        **conditioning,
    )[0]
    unpacked: Tensor = FluxPipeline._unpack_latents(packed, height, width, vae_scale_factor=1)
    return unpacked


def attention_blocks(model: Any) -> list[Any]:
    """Double blocks, then single ones, as the contract counts them."""
    return [*model.transformer_blocks, *model.single_transformer_blocks]


def image_tokens(count: int) -> slice:
    """Where the image tokens are in diffusers' own sequence: last, behind the text."""
    return slice(-count, None)


def latents_size(inputs: Mapping[str, Any]) -> tuple[int, ...]:
    """Size of the latents behind the rows, as the contract names it, of one call of the model.

    Args:
        inputs: By name in the model's ``forward``; latents are packed, and their places say how.
    """
    height, width = (int(side) + 1 for side in inputs["img_ids"][:, 1:].amax(dim=0).tolist())
    return inputs["hidden_states"].shape[2] // 4, 2 * height, 2 * width


def cond_rows(pipeline: Any, inputs: Mapping[str, Any]) -> slice:
    """Rows with the prompt in one call of the model: all.

    Args:
        pipeline: The ``FluxPipeline`` that makes the call.
        inputs: By name in the model's ``forward``.
    """
    return slice(0, inputs["hidden_states"].shape[0])
