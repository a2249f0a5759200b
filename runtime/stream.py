"""One step of a run as a person sees it: how far it is, what is to be seen, and at last the picture."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from emag_export.manifest import PreviewFactors
from emag_export.runtime.loop import DenoiseStep
from emag_export.runtime.pictures.metadata import Picture
from emag_export.runtime.pictures.preview import enlarge, preview

__all__ = ["StreamStep", "preview_images", "previews_of"]


@dataclass(frozen=True, kw_only=True)
class StreamStep:
    """One finished step of :meth:`Pipeline.stream`."""

    index: int
    """From 0."""
    steps: int
    """In all."""
    latents: Float[Tensor, "images channels *sides"]
    previews: tuple[Image.Image, ...] = ()
    """What the finished pictures are likely to be, at their size, where previews were asked for."""
    images: tuple[Picture, ...] = ()
    """The finished pictures, with the last step."""


def previews_of(
    step: DenoiseStep, factors: PreviewFactors, *, height: int, width: int
) -> tuple[Image.Image, ...]:
    """The clean latents that a step predicts, as pictures; arguments as :func:`preview_images`."""
    return preview_images(step.clean, factors, height=height, width=width)


def preview_images(
    clean: Float[Tensor, "images channels *sides"], factors: PreviewFactors, *, height: int, width: int
) -> tuple[Image.Image, ...]:
    """Latents as pictures of the finished size, without the VAE.

    Args:
        clean: x0 that a step predicts.
        factors: Of the bundle.
        height: Pixels.
        width: Pixels.
    """
    small: Sequence[object] = list(preview(clean, factors))
    return tuple(Image.fromarray(enlarge(picture, height, width)) for picture in small)  # type: ignore[arg-type]
