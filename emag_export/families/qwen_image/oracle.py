"""The unmodified diffusers model of Qwen-Image, as its own pipeline calls it: the reference's half."""

from collections.abc import Mapping
from typing import Any

from diffusers.pipelines.qwenimage.pipeline_qwenimage import QwenImagePipeline
from jaxtyping import Float
from torch import Tensor

from emag_export.families.unmodified import attention_blocks

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


def predict(
    model: Any,
    latents: Float[Tensor, "rows channels height width"],
    timestep: Float[Tensor, " rows"],
    conditioning: Mapping[str, Tensor],
) -> Float[Tensor, "rows channels height width"]:
    """The velocity of every row, packed and unpacked by the pipeline's own functions.

    Args:
        model: The diffusers transformer.
        latents: In the model's dtype.
        timestep: Of the scheduler; the model takes a thousandth of it, in its dtype.
        conditioning: By name; numbers that are not whole in the model's dtype.
    """
    rows, channels, height, width = latents.shape
    prediction = model(
        hidden_states=QwenImagePipeline._pack_latents(latents, rows, channels, height, width),
        timestep=timestep.to(latents.dtype) / 1000,
        img_shapes=[[(1, height // 2, width // 2)]] * rows,
        return_dict=False,
        **conditioning,
    )[0]
    unpacked: Tensor = QwenImagePipeline._unpack_latents(prediction, height, width, 1)
    return unpacked[:, :, 0]


def image_tokens(count: int) -> slice:
    """Where the image tokens are in diffusers' own sequence: last, behind the text."""
    return slice(-count, None)


def latents_size(inputs: Mapping[str, Any]) -> tuple[int, ...]:
    """Size of the latents behind the rows, as the contract names it, of one call of the model.

    Args:
        inputs: By name in the model's ``forward``.
    """
    ((_, height, width),) = inputs["img_shapes"][0]
    return inputs["hidden_states"].shape[-1] // 4, 2 * height, 2 * width


def cond_rows(pipeline: Any, inputs: Mapping[str, Any]) -> slice:
    """Rows with the prompt in one call of the model: all.

    Args:
        pipeline: The ``QwenImagePipeline`` that makes the call.
        inputs: By name in the model's ``forward``.
    """
    return slice(0, inputs["hidden_states"].shape[0])
