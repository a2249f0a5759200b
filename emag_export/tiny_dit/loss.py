r"""Training loss of a DiT: squared error of the noise, and the variational bound for the variance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

SNR_LIMIT = 5.0
r"""Noise levels with a signal-to-noise ratio above this one count as if they had it, :math:`\gamma`."""

SIGNAL_LIMIT = 0.05
r"""Below this :math:`\bar\alpha`, examples stop gaining weight."""

BOUND_WEIGHT = 0.1
"""Weight of the bound, nats per latent number, against the squared error."""

EARLY = 1.25
"""Timesteps are 1000 times a uniform number to this power: somewhat more of the little noise of outlines."""

Latents = Float[Tensor, "rows channels height width"]
Rows = Float[Tensor, " rows"]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One step's examples.

    Attributes:
        latents: Clean latents :math:`x_0`, scaled.
        noise: Standard normal numbers of the same shape.
        timestep: 0 to 999.
        labels: Classes, some of them the null class.
    """

    latents: Latents
    noise: Latents
    timestep: Int[Tensor, " rows"]
    labels: Int[Tensor, " rows"]


def draw_timesteps(count: int, generator: torch.Generator) -> Int[Tensor, " rows"]:
    """Draw timesteps, one from each of ``count`` equal parts of the distribution, which steadies the loss.

    Args:
        count: Rows.
        generator: The only source of randomness.

    Returns:
        0 to 999, in random order.
    """
    order = torch.randperm(count, generator=generator)
    level = (order + torch.rand(count, generator=generator)) / count
    return (1000 * level**EARLY).long().clamp(max=999)


def hybrid_loss(transformer: Any, betas: Float[Tensor, " steps"], batch: Batch) -> Tensor:
    r"""Weigh the squared error of :math:`\epsilon`, and add the bound of the learned variance.

    The weight is :math:`1/\bar\alpha`, which makes it the error of the velocity: without it, where a shape
    goes, which is decided in much noise, hardly counts and is learned last. Min-SNR weighs little noise less.

    Args:
        transformer: Predicts noise, then the variance's place between its limits, -1 to 1.
        betas: The scheduler's :math:`\beta_t`.
        batch: Examples.

    Returns:
        The mean over rows and latent numbers, a scalar.

    Source:
        arXiv:2102.09672, equations 15 and 16; arXiv:2202.00512, equation 9 (velocity); arXiv:2303.09556,
        section 3.4 (min-SNR).
    """
    signal = torch.cumprod(1 - betas, 0)[batch.timestep]
    level = signal[:, None, None, None]
    noisy = level.sqrt() * batch.latents + (1 - level).sqrt() * batch.noise
    output = transformer(noisy, timestep=batch.timestep, class_labels=batch.labels, return_dict=False)[0]
    predicted, place = output.float().chunk(2, dim=1)
    error = (predicted - batch.noise).square()
    ratio = signal / (1 - signal)
    weight = ratio.clamp(max=SNR_LIMIT) / ratio / signal.clamp(min=SIGNAL_LIMIT)
    simple = (weight * error.mean((1, 2, 3))).mean()
    total: Tensor = simple + BOUND_WEIGHT * bound(place, error.detach(), betas, batch.timestep).mean()
    return total


def bound(
    place: Latents, error: Latents, betas: Float[Tensor, " steps"], timestep: Int[Tensor, " rows"]
) -> Latents:
    r"""KL divergence of the true from the predicted distribution of :math:`x_{t-1}`, nats.

    Args:
        place: Predicted place of the log-variance: -1 is :math:`\tilde\beta_t`, 1 is :math:`\beta_t`.
        error: Squared error of the predicted noise; no gradient, so the bound trains the variance alone.
        betas: The scheduler's :math:`\beta_t`.
        timestep: 0 to 999.

    Returns:
        One number per latent number. At step 0, whose true variance is 0, the variance of step 1 stands in.

    Source:
        arXiv:2102.09672, equation 15; arXiv:2006.11239, equations 7 and 8.
    """
    kept = torch.cumprod(1 - betas, 0)
    posterior = betas[1:] * (1 - kept[:-1]) / (1 - kept[1:])
    posterior = torch.cat([posterior[:1], posterior])
    mean_error = betas.square() / ((1 - betas) * (1 - kept))
    low, high, factor = (
        row[timestep][:, None, None, None] for row in (posterior.log(), betas.log(), mean_error)
    )
    share = (place + 1) / 2
    log_variance = share * high + (1 - share) * low
    return 0.5 * (
        log_variance - low - 1 + torch.exp(low - log_variance) + factor * error * torch.exp(-log_variance)
    )
