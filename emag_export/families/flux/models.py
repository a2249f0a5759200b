"""Flux.1 models known by name, and defaults for others. A table of facts."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from emag_export.models import KnownModel, SamplingDefaults

__all__ = ["MODELS", "defaults_of"]


def defaults_of(side: int, blocks: int) -> SamplingDefaults:
    """How Flux.1-dev is sampled when nothing else is said.

    Steps and embedded guidance: ``FluxPipeline``. The model is distilled from guided predictions, so a step
    has no unconditional row, and EMAG guides alone. Nobody published EMAG for it: its scale is that of the
    recorded trajectories of this guidance, and candidates are a quarter to a third of the depth, as for SD3:
    the last double blocks and the first single one.

    Args:
        side: Pixels along a side of the pictures that the model was trained on.
        blocks: Of the transformer, double and single.
    """
    return SamplingDefaults(
        height=side,
        width=side,
        guidance="emag-only",
        guidance_scale=1.0,
        embedded_guidance=3.5,
        emag_scale=3.0,
        candidates=tuple(range(blocks // 4, blocks // 3 + 1)),
        max_sequence_length=512,
    )


_DEV = defaults_of(1024, 57)

MODELS: Mapping[str, KnownModel] = MappingProxyType(
    {
        "flux.1-dev": KnownModel(
            source="black-forest-labs/FLUX.1-dev",
            summary="Flux.1 dev, 11.9 B parameters, guidance distilled, 1024x1024",
            gated=True,
            blocks=57,
            precision="bfloat16",
            defaults=_DEV,
        ),
        # Steps and text length: the model card.
        "flux.1-schnell": KnownModel(
            source="black-forest-labs/FLUX.1-schnell",
            summary="Flux.1 schnell, 11.9 B parameters, distilled to four steps",
            blocks=57,
            precision="bfloat16",
            defaults=replace(_DEV, steps=4, embedded_guidance=None, max_sequence_length=256),
        ),
    }
)
