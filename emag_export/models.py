"""What is known of a model besides its weights: where it comes from, and how it is sampled."""

from dataclasses import dataclass

__all__ = ["KnownModel", "SamplingDefaults"]


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
    candidates: tuple[int, ...] = (6, 7, 8)
    """Blocks that EMAG may perturb."""
    max_sequence_length: int = 256
    """Tokens of the part of the text whose length can be chosen; 0 where prompts are no text."""


@dataclass(frozen=True, kw_only=True)
class KnownModel:
    """A model that is known by name."""

    source: str
    """Hub id, or ``package:`` and a folder inside this package."""
    summary: str
    gated: bool = False
    license: str = "Apache-2.0"
    """Of the weights, where they are not gated."""
    blocks: int
    """Transformer blocks of the checkpoint."""
    precision: str = "float16"
    """Of a bundle, where no other is asked for."""
    defaults: SamplingDefaults
