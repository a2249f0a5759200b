"""SD3 models known by name. A table of facts."""

from collections.abc import Mapping
from types import MappingProxyType

from emag_export.kinds import Variant
from emag_export.models import KnownModel, NegativeDefaults, SamplingDefaults

__all__ = ["MODELS", "defaults_of"]


def defaults_of(side: int, blocks: int) -> SamplingDefaults:
    """The paper's for SD3-medium, and a quarter to a third of the depth.

    Args:
        side: Pixels along a side of the pictures that the model was trained on.
        blocks: Of the transformer.
    """
    return SamplingDefaults(height=side, width=side, candidates=tuple(range(blocks // 4, blocks // 3 + 1)))


_LARGE = (9, 10, 11, 12, 13)
"""Candidates of 38 blocks."""

_MEDIUM: Mapping[Variant, NegativeDefaults] = {
    # Stability AI's reference code of SD3.5-medium, and what diffusers' guiders recommend for it.
    Variant.SKIP: NegativeDefaults(added_scale=2.8, candidates=(7, 8, 9), start=245, stop=203),
    Variant.BLUR_QUERY: NegativeDefaults(added_scale=3.0, candidates=(7, 8, 9)),
    # The example of diffusers' StableDiffusion3PAGPipeline; written for SD3-medium, as deep as this one.
    Variant.IDENTITY: NegativeDefaults(added_scale=0.7, candidates=(13,)),
}
"""Of models with 24 blocks."""

MODELS: Mapping[str, KnownModel] = MappingProxyType(
    {
        # Trained here, see emag_export/tiny_sd3; its middle is to 10 blocks what 6-8 is to 24.
        "tiny-sd3": KnownModel(
            source="package:tiny_sd3/model",
            summary="embedded, trained on coloured shapes, 64x64",
            blocks=10,
            precision="float32",
            defaults=SamplingDefaults(
                height=64,
                width=64,
                guidance_scale=4.0,
                apg_scale=6.0,
                apg_norm_threshold=3.0,
                candidates=(3, 4, 5),
                max_sequence_length=20,
            ),
            examples=(
                "a large red circle on a blue background",
                "a large red circle to the left of a small blue square on a yellow background",
                "a large green triangle on a white background",
                "a small blue circle above a large purple ring on a green background",
                "a large black ring on an orange background",
            ),
        ),
        # Guidance and steps: arXiv:2512.17303, section 5. Blocks: the checkpoints' transformer/config.json.
        "sd3": KnownModel(
            source="stabilityai/stable-diffusion-3-medium-diffusers",
            summary="Stable Diffusion 3 medium, 2.1 B parameters, 1024x1024",
            gated=True,
            blocks=24,
            defaults=SamplingDefaults(height=1024, width=1024),
            negatives=_MEDIUM,
        ),
        # Guidance and steps: the model cards. EMAG's blocks: a quarter to a third of the depth, as for sd3.
        "sd3.5-medium": KnownModel(
            source="stabilityai/stable-diffusion-3.5-medium",
            summary="Stable Diffusion 3.5 medium, 2.5 B parameters, 1024x1024",
            gated=True,
            blocks=24,
            defaults=SamplingDefaults(height=1024, width=1024, steps=40, guidance_scale=4.5),
            negatives=_MEDIUM,
        ),
        "sd3.5-large": KnownModel(
            source="stabilityai/stable-diffusion-3.5-large",
            summary="Stable Diffusion 3.5 large, 8.1 B parameters, 1024x1024",
            gated=True,
            blocks=38,
            defaults=SamplingDefaults(height=1024, width=1024, guidance_scale=3.5, candidates=_LARGE),
        ),
        # Distilled to four steps without CFG (model card): w = 1, so only EMAG guides.
        "sd3.5-large-turbo": KnownModel(
            source="stabilityai/stable-diffusion-3.5-large-turbo",
            summary="Stable Diffusion 3.5 large turbo, 8.1 B parameters, four steps",
            gated=True,
            blocks=38,
            defaults=SamplingDefaults(
                height=1024,
                width=1024,
                steps=4,
                guidance="emag-only",
                guidance_scale=1.0,
                candidates=_LARGE,
            ),
        ),
    }
)
