"""Condition-annealed diffusion sampling (arXiv:2310.17347)."""

import math
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from emag_export.errors import InputError
from emag_export.runtime.checks import require_finite, require_range

__all__ = ["CadsConfig", "cads", "cads_gamma"]


@dataclass(frozen=True, kw_only=True)
class CadsConfig:
    """Settings of CADS; the defaults are EMAG's for SD3-medium (arXiv:2512.17303, appendix)."""

    tau1: float = 0.6
    """Time below which the condition is left alone."""
    tau2: float = 1.0
    """Time above which the condition is all noise."""
    noise_scale: float = 0.25
    mixing: float = 1.0
    """psi: 1 rescales to the condition's own mean and standard deviation, 0 does not."""

    def __post_init__(self) -> None:
        require_range(0.0, 1.0, cads_mixing=self.mixing)
        if not 0 <= self.tau1 < self.tau2:
            raise InputError(f"CADS needs 0 <= tau1 < tau2, got tau1={self.tau1} and tau2={self.tau2}")
        require_finite(cads_noise_scale=self.noise_scale, cads_tau1=self.tau1, cads_tau2=self.tau2)


def cads_gamma(index: int, steps: int, config: CadsConfig) -> float:
    """How much of the condition is left at step ``index`` of ``steps``: 0 none, 1 all.

    Args:
        index: From 0, the noisiest step first.
        steps: Of the run.
        config: Settings.

    Returns:
        gamma, 0 to 1.

    Examples:
        >>> from emag_export.runtime.guidance.cads import CadsConfig, cads_gamma
        >>> [cads_gamma(index, 4, CadsConfig()) for index in range(4)]
        [0.0, 0.625, 1.0, 1.0]

    Source:
        arXiv:2310.17347, eq. 2, with t = 1 - index / steps.
    """
    time = 1 - index / steps
    return min(1.0, max(0.0, (config.tau2 - time) / (config.tau2 - config.tau1)))


def cads(
    embeds: Float[Tensor, "images tokens width"],
    noise: Float[Tensor, "images tokens width"],
    gamma: float,
    config: CadsConfig,
    mask: Int[Tensor, "images tokens"] | None = None,
) -> Float[Tensor, "images tokens width"]:
    """Mix noise into the prompt embedding, image by image.

    Args:
        embeds: Sequence embedding of the prompts; the pooled one stays as it is.
        noise: Standard normal, same shape.
        gamma: From :func:`cads_gamma`; 1 returns ``embeds``.
        config: Settings.
        mask: 1 for tokens that are real; None where all are. What padding becomes does not matter.

    Returns:
        The annealed embedding, same shape.

    Examples:
        >>> import torch
        >>> from emag_export.runtime.guidance.cads import CadsConfig, cads
        >>> embeds, noise = torch.randn(2, 1, 40, 128)
        >>> mixed = cads(embeds, noise, 0.5, CadsConfig())
        >>> torch.allclose(mixed.std(), embeds.std()), torch.equal(mixed, embeds)
        (True, False)

    Source:
        arXiv:2310.17347, eqs. 3 and 4; statistics over all real tokens and channels of one image.
    """
    if gamma >= 1:
        return embeds
    mixed = math.sqrt(gamma) * embeds + config.noise_scale * math.sqrt(1 - gamma) * noise
    (mean, std), (mixed_mean, mixed_std) = _statistics(embeds, mask), _statistics(mixed, mask)
    rescaled = (mixed - mixed_mean) / mixed_std * std + mean
    return config.mixing * rescaled + (1 - config.mixing) * mixed


def _statistics(
    embeds: Float[Tensor, "images tokens width"], mask: Int[Tensor, "images tokens"] | None
) -> tuple[Float[Tensor, "images 1 1"], Float[Tensor, "images 1 1"]]:
    """Mean and standard deviation of every image."""
    dims = (1, 2)
    if mask is None:
        return embeds.mean(dim=dims, keepdim=True), embeds.std(dim=dims, keepdim=True)
    real = mask[..., None].to(embeds.dtype)
    count = real.sum(dim=dims, keepdim=True) * embeds.shape[-1]
    mean = (real * embeds).sum(dim=dims, keepdim=True) / count
    square = (real * (embeds - mean) ** 2).sum(dim=dims, keepdim=True)
    return mean, (square / (count - 1)).sqrt()
