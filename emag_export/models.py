"""Models known by name: where they come from and how they are sampled. A table of facts."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

__all__ = ["KNOWN_MODELS", "KnownModel", "SamplingDefaults", "sampling_defaults"]


@dataclass(frozen=True, kw_only=True)
class SamplingDefaults:
    """What ``generate`` does when it is not told otherwise; recorded in the bundle."""

    height: int
    """Pixels."""
    width: int
    steps: int = 28
    guidance_scale: float = 7.0
    emag_scale: float = 1.5
    apg_scale: float = 12.0
    apg_norm_threshold: float = 7.5
    """In latent units over a whole picture, so it grows with the square root of the latents' size."""
    emag_layers: tuple[int, ...] = (6, 7, 8)
    max_sequence_length: int = 256
    """Tokens of the T5 part of the text, zeros where there is no T5."""


@dataclass(frozen=True, kw_only=True)
class KnownModel:
    """One row of the table."""

    source: str
    """Hub id, or ``package:`` and a folder inside this package."""
    summary: str
    gated: bool = False
    blocks: int
    """Transformer blocks of the checkpoint."""
    precision: str = "float16"
    """Of a bundle, where no other is asked for."""
    defaults: SamplingDefaults


KNOWN_MODELS: Mapping[str, KnownModel] = MappingProxyType(
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
                emag_layers=(3, 4, 5),
                max_sequence_length=20,
            ),
        ),
        # Guidance and steps: arXiv:2512.17303, section 5. Blocks: the checkpoints' transformer/config.json.
        "sd3": KnownModel(
            source="stabilityai/stable-diffusion-3-medium-diffusers",
            summary="Stable Diffusion 3 medium, 2.1 B parameters, 1024x1024",
            gated=True,
            blocks=24,
            defaults=SamplingDefaults(height=1024, width=1024),
        ),
        # Guidance and steps: the model cards. EMAG's blocks: a quarter to a third of the depth, as for sd3.
        "sd3.5-medium": KnownModel(
            source="stabilityai/stable-diffusion-3.5-medium",
            summary="Stable Diffusion 3.5 medium, 2.5 B parameters, 1024x1024",
            gated=True,
            blocks=24,
            defaults=SamplingDefaults(height=1024, width=1024, steps=40, guidance_scale=4.5),
        ),
        "sd3.5-large": KnownModel(
            source="stabilityai/stable-diffusion-3.5-large",
            summary="Stable Diffusion 3.5 large, 8.1 B parameters, 1024x1024",
            gated=True,
            blocks=38,
            defaults=SamplingDefaults(
                height=1024, width=1024, guidance_scale=3.5, emag_layers=(9, 10, 11, 12, 13)
            ),
        ),
        # Distilled to four steps without CFG (model card): w = 1, so only EMAG guides; --guidance emag-only
        # saves the unconditional row.
        "sd3.5-large-turbo": KnownModel(
            source="stabilityai/stable-diffusion-3.5-large-turbo",
            summary="Stable Diffusion 3.5 large turbo, 8.1 B parameters, four steps",
            gated=True,
            blocks=38,
            defaults=SamplingDefaults(
                height=1024, width=1024, steps=4, guidance_scale=1.0, emag_layers=(9, 10, 11, 12, 13)
            ),
        ),
    }
)


def sampling_defaults(model: str, *, blocks: int, sample_pixels: int) -> SamplingDefaults:
    """Defaults of a known model, or sensible ones for any other.

    Args:
        model: Name or path, as the user gave it.
        blocks: Transformer blocks, for the choice of EMAG's candidates.
        sample_pixels: Height and width the checkpoint was trained at.
    """
    if model in KNOWN_MODELS:
        return KNOWN_MODELS[model].defaults
    first, last = blocks // 4, blocks // 3
    return SamplingDefaults(
        height=sample_pixels, width=sample_pixels, emag_layers=tuple(range(first, last + 1))
    )
