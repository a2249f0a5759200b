"""Adaptive projected guidance (arXiv:2410.02416)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from emag_export.runtime.checks import require_finite, require_range
from emag_export.runtime.guidance.clean import Clean, Number

__all__ = ["ApgConfig", "ApgTerms", "apg"]


@dataclass(frozen=True, kw_only=True)
class ApgConfig:
    """Settings of APG; the defaults are EMAG's for SD3-medium (arXiv:2512.17303, appendix)."""

    scale: float = 12.0
    """w; takes the place of the CFG scale."""
    eta: float = 0.0
    """Weight of the part parallel to the prediction; 1 keeps all of it."""
    norm_threshold: float = 7.5
    """rho, the largest norm of the difference, in latent units."""
    momentum: float = -0.5
    """m; negative values push away from the direction of earlier steps."""

    def __post_init__(self) -> None:
        require_finite(apg_scale=self.scale, apg_eta=self.eta, apg_momentum=self.momentum)
        require_range(0.0, float("inf"), apg_norm_threshold=self.norm_threshold)

    @property
    def terms(self) -> "ApgTerms":
        """The same for all images."""
        return ApgTerms(
            gain=self.scale - 1,
            eta=self.eta,
            norm_threshold=self.norm_threshold,
            momentum=self.momentum,
        )


@dataclass(frozen=True, kw_only=True)
class ApgTerms:
    """Numbers of :func:`apg`, for all images or one each."""

    gain: Number
    """w - 1."""
    eta: Number
    norm_threshold: Number
    momentum: Number


Latents = Float[Tensor, "images channels *sides"]


def apg(
    latents: Latents, cond: Latents, uncond: Latents, momentum: Latents, clean: Clean, terms: ApgTerms
) -> tuple[Latents, Latents]:
    """Guide in x0 space with momentum, a norm limit and an orthogonal projection.

    Args:
        latents: x at this step, latent units.
        cond: Prediction given the prompt: a velocity, latent units per unit sigma, or epsilon.
        uncond: Prediction without it, same units.
        momentum: M of the previous step, in latent units; zeros at the first.
        clean: x0 of a prediction, and back.
        terms: Settings.

    Returns:
        The guided prediction, and M of this step.

    Examples:
        >>> import torch
        >>> from emag_export.runtime.guidance.apg import ApgConfig, apg
        >>> from emag_export.runtime.guidance.clean import Clean
        >>> from emag_export.runtime.guidance.rules import cfg
        >>> x, c, u = torch.randn(3, 1, 4, 8, 8)
        >>> without = ApgConfig(scale=7.0, eta=1.0, norm_threshold=float("inf"), momentum=0.0).terms
        >>> guided, momentum = apg(x, c, u, torch.zeros_like(x), Clean.of(1.0, -0.5), without)
        >>> torch.allclose(guided, cfg(u, c, 7.0), atol=1e-3)  # without its three ideas, APG is CFG
        True

    Source:
        arXiv:2410.02416, algorithm 1, applied per image.
    """
    x0, x0_uncond = clean.latents(latents, cond), clean.latents(latents, uncond)
    momentum = x0 - x0_uncond + terms.momentum * momentum
    dims = tuple(range(1, latents.ndim))
    norm = torch.linalg.vector_norm(momentum, dim=dims, keepdim=True)
    difference = momentum * (terms.norm_threshold / norm.clamp_min(1e-12)).clamp_max(1)
    energy = x0.square().sum(dim=dims, keepdim=True).clamp_min(1e-12)
    parallel = (difference * x0).sum(dim=dims, keepdim=True) / energy * x0
    guided = x0 + terms.gain * (difference - parallel + terms.eta * parallel)
    return clean.prediction(latents, guided), momentum
