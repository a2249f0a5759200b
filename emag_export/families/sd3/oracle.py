"""The unmodified diffusers model of SD3, as its own pipeline calls it: the reference's half of the family."""

from collections.abc import Mapping
from typing import Any

from emag_export.errors import ModelError
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

STREAMS = ("encoder_hidden_states", "hidden_states")
"""Parameters of a block that it returns changed, in the order in which it returns them."""

PIPELINE_ATTRIBUTES = ("transformer", "scheduler", "do_classifier_free_guidance")
"""What guidance inside the pipeline reads of it."""


SEPARATE_CALLS = False
"""With CFG the pipeline calls the model once in a step, for all rows."""


def cond_rows(pipeline: Any, inputs: Mapping[str, Any]) -> slice:
    """Rows with the prompt in one call of the model: the second half, or all without CFG.

    Args:
        pipeline: The ``StableDiffusion3Pipeline`` that makes the call.
        inputs: By name in the model's ``forward``.

    Raises:
        ModelError: If there are no halves.
    """
    rows = inputs["hidden_states"].shape[0]
    if not pipeline.do_classifier_free_guidance:
        return slice(0, rows)
    if rows % 2:
        raise ModelError(
            f"the transformer was called with {rows} rows, which are no two halves of CFG; leave out other "
            "guidance of the pipeline, as skip_guidance_layers"
        )
    return slice(rows // 2, rows)
