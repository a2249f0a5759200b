"""DiT models known by name, and defaults for others. A table of facts."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from emag_export.models import KnownModel, SamplingDefaults

__all__ = ["MODELS", "defaults_of"]


def defaults_of(side: int, blocks: int) -> SamplingDefaults:
    """How a DiT is sampled when nothing else is said.

    Steps: the released EMAG run, and the evaluation of arXiv:2212.09748 (section 4). Which sampler takes
    them is the checkpoint's own: DDIM in the published ones, as diffusers converted them, where both papers
    used DDPM with the learned variance. Guidance scale: ``DiTPipeline`` and the released DiT. EMAG scale and
    candidates: arXiv:2512.17303 and its released code, which begins at block 12 of 28. Windows: the released
    150, 50 and 50, in steps.

    Args:
        side: Pixels along a side of the pictures that the model was trained on.
        blocks: Of the transformer.
    """
    first = blocks * 3 // 7
    return SamplingDefaults(
        height=side,
        width=side,
        steps=250,
        guidance_scale=4.0,
        emag_scale=3.0,
        candidates=tuple(range(first, max(first + 1, blocks // 2 + 1))),
        emag_start=150,
        emag_delta=50,
        emag_stop=50,
        emag_unit="steps",
        max_sequence_length=0,
    )


def _xl_2(side: int) -> KnownModel:
    return KnownModel(
        source=f"facebook/DiT-XL-2-{side}",
        summary=f"DiT-XL/2, 0.7 B parameters, classes of ImageNet, {side}x{side}",
        license="CC BY-NC 4.0",
        blocks=28,
        defaults=defaults_of(side, 28),
    )


MODELS: Mapping[str, KnownModel] = MappingProxyType(
    {
        # Trained here, see emag_export/tiny_dit. Its run is a tenth of the published one, windows with it.
        "tiny-dit": KnownModel(
            source="package:tiny_dit/model",
            summary="embedded, trained on coloured shapes as classes, 64x64",
            blocks=8,
            precision="float32",
            defaults=replace(
                defaults_of(64, 8), steps=25, apg_scale=6.0, apg_norm_threshold=3.0, emag_unit="250ths"
            ),
            examples=("red circle", "blue square", "green triangle", "purple ring", "black star"),
        ),
        **{f"dit-xl-2-{side}": _xl_2(side) for side in (256, 512)},
    }
)
