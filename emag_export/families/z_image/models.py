"""Z-Image models known by name, and defaults for others. A table of facts."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from emag_export.models import KnownModel, SamplingDefaults

__all__ = ["MODELS", "defaults_of"]


def defaults_of(side: int, blocks: int) -> SamplingDefaults:
    """How Z-Image is sampled when nothing else is said.

    Steps and guidance: the example of the model card of Tongyi-MAI/Z-Image, 50 steps and guidance 4. The
    pipeline's number g stands in c + g (c - u), ours in u + w (c - u): w is g + 1. Text length: the pipeline.
    EMAG's scale is the paper's; candidates are a quarter to a third of the depth, as for SD3.

    Args:
        side: Pixels along a side of the pictures that the model was trained on.
        blocks: Of the transformer, without its refiners.
    """
    return SamplingDefaults(
        height=side,
        width=side,
        steps=50,
        guidance_scale=5.0,
        candidates=tuple(range(blocks // 4, blocks // 3 + 1)),
        max_sequence_length=512,
    )


_BASE = defaults_of(1024, 30)

MODELS: Mapping[str, KnownModel] = MappingProxyType(
    {
        "z-image": KnownModel(
            source="Tongyi-MAI/Z-Image",
            summary="Z-Image, 6.2 B parameters, 1024x1024",
            blocks=30,
            precision="bfloat16",
            defaults=_BASE,
        ),
        # Distilled: the example of diffusers' ZImagePipeline has 8 steps and guidance 0, which is w = 1.
        "z-image-turbo": KnownModel(
            source="Tongyi-MAI/Z-Image-Turbo",
            summary="Z-Image Turbo, 6.2 B parameters, eight steps",
            blocks=30,
            precision="bfloat16",
            defaults=replace(_BASE, steps=8, guidance="emag-only", guidance_scale=1.0),
        ),
    }
)
