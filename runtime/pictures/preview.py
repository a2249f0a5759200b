"""Previews: latents to small pictures by one linear map, without the VAE.

On one CPU core 0.06 ms for 16 × 16 latents and 2 ms for 128 × 128.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image

from emag_export.bundle import Bundle
from emag_export.errors import BundleError, InputError
from emag_export.manifest import PreviewFactors
from emag_export.runtime.loop import DenoiseStep

__all__ = [
    "PREVIEWS",
    "PreviewFactors",
    "SavePreviews",
    "enlarge",
    "preview",
    "preview_factors",
    "preview_saver",
]

PREVIEWS = "previews"
"""Sub-folder beside the pictures; whoever looks for foreign files there passes over it."""

Small = UInt8[np.ndarray, "images latent_height latent_width 3"]


def preview_factors(bundle: Bundle) -> PreviewFactors:
    """What the bundle says about previews.

    Raises:
        BundleError: If it was built where there is nothing to fit them to: no VAE, or random weights.
    """
    if bundle.preview is None:
        raise BundleError(
            f"{bundle.path} holds no preview factors: it was built without a VAE or with random weights; "
            "generate without previews, or build it from a checkpoint with its VAE"
        )
    return bundle.preview


def preview(
    latents: Float[torch.Tensor, "images channels latent_height latent_width"], factors: PreviewFactors
) -> Small:
    """Latents to 8-bit sRGB pictures of one pixel per latent pixel.

    Args:
        latents: As the loop has them, or ``DenoiseStep.clean``; on any device. The host waits for them.
        factors: Of the bundle that made them.

    Raises:
        InputError: If the latents have another number of channels than the factors.
    """
    if latents.shape[1] != factors.channels:
        raise InputError(
            f"these latents have {latents.shape[1]} channels, the preview factors take {factors.channels}; "
            "take the factors of the bundle that made the latents"
        )
    weights = torch.tensor(factors.factors, dtype=torch.float32, device=latents.device)
    bias = torch.tensor(factors.bias, dtype=torch.float32, device=latents.device)
    colours = (latents.float().movedim(1, -1) @ weights + bias).clamp(0, 1)
    return np.asarray((colours * 255).round().to(torch.uint8).cpu().numpy())


def enlarge(
    picture: UInt8[np.ndarray, "h w 3"], height: int, width: int
) -> UInt8[np.ndarray, "height width 3"]:
    """A small picture at ``height`` by ``width`` pixels, bicubic."""
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC))


SavePreviews = Callable[[DenoiseStep, Sequence[Path]], list[Path]]
"""(the step, where the finished pictures will be) to the files that were written."""


def preview_saver(bundle: Bundle, every: int | None) -> SavePreviews:
    """What a loop calls after each step to leave ``previews/NAME.step-012.png`` beside its pictures to be.

    Shown are the clean latents that the step predicts, at the size of the finished picture. Files of the same
    name are replaced; each appears whole or not at all.

    Args:
        bundle: Makes the pictures.
        every: Write after every that many steps; None writes nothing, and needs no factors.

    Raises:
        BundleError: If the bundle holds no usable factors.
    """
    if every is None:
        return lambda step, paths: []
    factors, pixels = preview_factors(bundle), bundle.geometry.pixels_per_latent

    def save(step: DenoiseStep, paths: Sequence[Path]) -> list[Path]:
        done = step.plan.index + 1
        if done % every:
            return []
        height, width = (side * pixels for side in step.latents.shape[-2:])
        written = []
        for picture, path in zip(preview(step.clean, factors), paths, strict=True):
            target = path.parent / PREVIEWS / f"{path.stem}.step-{done:03d}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f".{target.name}.partial")
            Image.fromarray(enlarge(picture, height, width)).save(partial, format="PNG")
            partial.replace(target)
            written.append(target)
        return written

    return save
