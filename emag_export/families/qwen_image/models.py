"""Qwen-Image by name, and defaults for others of its kind. A table of facts."""

from collections.abc import Mapping
from types import MappingProxyType

from emag_export.models import KnownModel, SamplingDefaults

__all__ = ["MODELS", "NATIVE_SIDE", "defaults_of"]

NATIVE_SIDE = 128
"""Latents along a side where nothing else is said: ``default_sample_size`` of ``QwenImagePipeline``."""


def defaults_of(side: int, blocks: int) -> SamplingDefaults:
    """How a Qwen-Image is sampled when nothing else is said.

    Steps and text length: the defaults of ``QwenImagePipeline``. Guidance scale: its ``true_cfg_scale``;
    behind it every image token gets the length that it has in the conditional prediction. EMAG's blocks: a
    quarter to a third of the depth; its windows and scale are those of arXiv:2512.17303 for SD3-medium, as
    nobody has published others.

    Args:
        side: Pixels along a side of the pictures that the model was trained on.
        blocks: Of the transformer.
    """
    return SamplingDefaults(
        height=side,
        width=side,
        steps=50,
        guidance_scale=4.0,
        cfg_norm=True,
        candidates=tuple(range(blocks // 4, blocks // 3 + 1)),
        max_sequence_length=512,
    )


MODELS: Mapping[str, KnownModel] = MappingProxyType(
    {
        # Size, steps and scale: the model card, whose square pictures have 1328 pixels along a side.
        "qwen-image": KnownModel(
            source="Qwen/Qwen-Image",
            summary="Qwen-Image, 20.4 B parameters, 1328x1328",
            license="Apache-2.0",
            blocks=60,
            precision="bfloat16",
            defaults=defaults_of(1328, 60),
        ),
    }
)
