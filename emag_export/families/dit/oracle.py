"""The unmodified diffusers model of DiT, as its own pipeline calls it: the reference's half of the family."""

from collections.abc import Mapping
from typing import Any

import torch

from emag_export.families.unmodified import attention_blocks, image_tokens, latents_size, predict

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

STREAMS = ("hidden_states",)
"""Parameters of a block that it returns changed, in the order in which it returns them."""

PIPELINE_ATTRIBUTES = ("transformer", "scheduler")
"""What guidance inside the pipeline reads of it."""

SEPARATE_CALLS = False
"""With CFG the pipeline calls the model once in a step, for all rows."""

_NULL_CLASS = 1000
"""The pipeline's own constant."""


def cond_rows(pipeline: Any, inputs: Mapping[str, Any]) -> slice:
    """Rows with the class in one call of the model: the *first* half, or all without CFG.

    The pipeline keeps its guidance scale to itself. With CFG it sends the same latents twice, the second time
    with the null class.

    Args:
        pipeline: The ``DiTPipeline`` that makes the call.
        inputs: By name in the model's ``forward``.
    """
    latents, labels = inputs["hidden_states"], inputs["class_labels"]
    rows = latents.shape[0]
    half = rows // 2
    doubled = (
        rows % 2 == 0
        and bool((labels[half:] == _NULL_CLASS).all())
        and torch.equal(latents[:half], latents[half:])
    )
    return slice(0, half if doubled else rows)
