"""Adaptive projected guidance (arXiv:2410.02416)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from emag_export.runtime.checks import require_finite, require_range

__all__ = ["ApgConfig", "apg"]

_SMALLEST_COEFFICIENT = 1e-5


@dataclass(frozen=True, kw_only=True)
class ApgConfig:
    """Settings of APG; the defaults are EMAG's for SD3 (arXiv:2512.17303, appendix)."""

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


def apg(
    latents: Float[Tensor, "images channels height width"],
    cond: Float[Tensor, "images channels height width"],
    uncond: Float[Tensor, "images channels height width"],
    momentum: Float[Tensor, "images channels height width"],
    coefficient: float,
    config: ApgConfig,
) -> tuple[Float[Tensor, "images channels height width"], Float[Tensor, "images channels height width"]]:
    """Guide in x0 space with momentum, a norm limit and an orthogonal projection.

    Args:
        latents: x at this step.
        cond: Velocity given the prompt, latent units per unit sigma.
        uncond: Velocity without it, same units.
        momentum: M of the previous step, in latent units; zeros at the first.
        coefficient: k in x0 = x + k v. Minus sigma for a velocity.
        config: Settings.

    Returns:
        The guided velocity, and M of this step.

    Source:
        arXiv:2410.02416, algorithm 1, applied per image.
    """
    clean, clean_uncond = latents + coefficient * cond, latents + coefficient * uncond
    momentum = clean - clean_uncond + config.momentum * momentum
    dims = (1, 2, 3)
    norm = torch.linalg.vector_norm(momentum, dim=dims, keepdim=True)
    difference = momentum * (config.norm_threshold / norm.clamp_min(1e-12)).clamp_max(1)
    energy = clean.square().sum(dim=dims, keepdim=True).clamp_min(1e-12)
    parallel = (difference * clean).sum(dim=dims, keepdim=True) / energy * clean
    guided = clean + (config.scale - 1) * (difference - parallel + config.eta * parallel)
    divisor = max(abs(coefficient), _SMALLEST_COEFFICIENT) * (1 if coefficient >= 0 else -1)
    return (guided - latents) / divisor, momentum
