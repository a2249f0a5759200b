"""What is known of a model besides its weights: where it comes from, and how it is sampled."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from emag_export.kinds import Variant

__all__ = ["KnownModel", "NegativeDefaults", "SamplingDefaults"]


@dataclass(frozen=True, kw_only=True)
class SamplingDefaults:
    """What ``generate`` does when it is not told otherwise; recorded in the bundle."""

    height: int
    """Pixels."""
    width: int
    steps: int = 28
    guidance: str = "emag"
    """Rule that combines the predictions; without an unconditional one where the model is distilled."""
    embedded_guidance: float | None = None
    """Scale that the model takes as an input; None where it has none."""
    guidance_scale: float = 7.0
    emag_scale: float = 1.5
    apg_scale: float = 12.0
    apg_norm_threshold: float = 7.5
    """In latent units over a whole picture, so it grows with the square root of the latents' size."""
    cfg_norm: bool = False
    """Every image token of a guided prediction gets the length that it has in the conditional one."""
    candidates: tuple[int, ...] = (6, 7, 8)
    """Blocks that may be perturbed."""
    emag_start: int = 250
    """Averaging begins, in ``emag_unit`` before the end of the run."""
    emag_delta: int = 50
    """Perturbation begins this much later."""
    emag_stop: int = 50
    """Both end."""
    emag_unit: str = "250ths"
    """Of the three: 250ths of the run, or steps. Windows in steps belong to the default number of steps; runs
    of another number take them as 250ths."""
    max_sequence_length: int = 256
    """Tokens of the part of the text whose length can be chosen; 0 where prompts are no text."""


@dataclass(frozen=True, kw_only=True)
class NegativeDefaults:
    """How a kind of negative is published for a model, where that is not EMAG's way."""

    added_scale: float
    """Of c - p, which such methods add to what CFG gives: u + w(c - u) + scale (c - p)."""
    candidates: tuple[int, ...] | None = None
    """Blocks that are perturbed; None takes the model's own candidates."""
    start: int = 250
    """Perturbation begins, in 250ths of the run before its end."""
    stop: int = 0
    """It ends."""

    def amend(self, defaults: SamplingDefaults) -> SamplingDefaults:
        """The model's defaults with this kind of negative.

        Here the scale stands inside CFG: u + w(p + s(c - p) - u), which is u + w(c - u) + w(s - 1)(c - p).

        Args:
            defaults: Of the model, for EMAG.
        """
        scale = defaults.guidance_scale
        return replace(
            defaults,
            candidates=defaults.candidates if self.candidates is None else self.candidates,
            emag_scale=1 + self.added_scale / scale if scale > 0 else 1 + self.added_scale,
            emag_start=self.start,
            emag_delta=0,
            emag_stop=self.stop,
            emag_unit="250ths",
        )


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
    negatives: Mapping[Variant, NegativeDefaults] = field(default_factory=dict)
    """Kinds of negatives that are published for this very model."""
    examples: tuple[str, ...] = ()
    """Prompts that a demonstration draws; of embedded models."""
