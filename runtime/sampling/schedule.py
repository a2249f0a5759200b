"""Schedules: diffusers' own schedulers as numbers, so that images at different steps can share a call.

Every first-order sampler is linear in the latents and the prediction. With ``z`` standard normal:

    x' = a x + b prediction + exp((low + f (high - low)) / 2) z
    x0 = p x + q prediction

``f`` is 0, or (v + 1) / 2 of a learned variance v that the model predicts beside epsilon.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Self

import numpy as np
import torch

from emag_export.errors import InputError, ModelError
from emag_export.families.family import Sigmas

__all__ = ["SAMPLERS", "Schedule", "ddim_schedule", "ddpm_schedule", "flow_match_schedule", "schedule_of"]

Config = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Coefficients of a run, one entry per step."""

    timesteps: tuple[float, ...]
    """As the model takes them."""
    sigmas: tuple[float, ...]
    """Noise level before each step, for people: sigma of flow matching, sqrt(1 - alpha) of diffusion."""
    a: tuple[float, ...]
    b: tuple[float, ...]
    p: tuple[float, ...]
    q: tuple[float, ...]
    log_variance: tuple[tuple[float, float] | None, ...] | None = None
    """(low, high) per step, None where a step adds no noise; None altogether for a deterministic sampler."""

    @classmethod
    def flow(cls, sigmas: tuple[float, ...], timesteps: tuple[float, ...]) -> Self:
        """Euler steps of flow matching: a velocity is dx / d sigma.

        Args:
            sigmas: One more than there are steps; the last one is the finished image's. Exact float32 values:
                they are subtracted in float32, as diffusers does.
            timesteps: One per step.
        """
        steps = len(timesteps)
        return cls(
            timesteps=timesteps,
            sigmas=sigmas[:-1],
            a=(1.0,) * steps,
            b=tuple(torch.tensor(sigmas).diff().tolist()),
            p=(1.0,) * steps,
            q=tuple(-sigma for sigma in sigmas[:-1]),
        )

    @property
    def steps(self) -> int:
        """Number of denoising steps."""
        return len(self.timesteps)


def schedule_of(
    config: Config, steps: int, image_tokens: int, *, prediction: str, sigmas: Sigmas = "scheduler"
) -> Schedule:
    """The schedule that a checkpoint's scheduler makes.

    Args:
        config: Its ``scheduler_config.json``.
        steps: Number of denoising steps, at least 1.
        image_tokens: Image tokens per row; dynamic shifting depends on it.
        prediction: What the model predicts, as its contract says.
        sigmas: Noise levels of flow matching before they are shifted, as the model's family says.

    Raises:
        InputError: If ``steps`` is below 1 or more than the scheduler has, or no finite noise levels come.
        ModelError: If the scheduler is not one of :data:`SAMPLERS`, or is set to what cannot be done here.
    """
    kind = config.get("_class_name", "FlowMatchEulerDiscreteScheduler")
    if kind not in SAMPLERS:
        raise ModelError(f"the scheduler is {kind}; only {', '.join(SAMPLERS)} are supported")
    wanted = "velocity" if SAMPLERS[kind] is flow_match_schedule else "epsilon"
    if prediction != wanted:
        raise ModelError(f"the model predicts {prediction}, its scheduler {kind} takes {wanted}")
    if SAMPLERS[kind] is flow_match_schedule:
        return flow_match_schedule(config, steps, image_tokens, sigmas=sigmas)
    return SAMPLERS[kind](config, steps, image_tokens)


def flow_match_schedule(
    config: Config, steps: int, image_tokens: int, *, sigmas: Sigmas = "scheduler"
) -> Schedule:
    """``FlowMatchEulerDiscreteScheduler``; arguments and errors as :func:`schedule_of`."""
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    _require_steps(steps)
    if config.get("stochastic_sampling") or config.get("invert_sigmas"):
        raise ModelError("stochastic_sampling and invert_sigmas are not supported; set both to false")
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(dict(config))
    mu = None
    if scheduler.config.use_dynamic_shifting:
        mu = _dynamic_shift(scheduler.config, image_tokens)
    if sigmas == "linear" and not scheduler.config.get("use_flow_sigmas"):
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps).tolist(), mu=mu)
    else:
        scheduler.set_timesteps(steps, mu=mu)
    if not torch.isfinite(scheduler.sigmas).all():
        raise InputError(
            f"this scheduler configuration gives no finite noise levels for {steps} steps; take more"
        )
    return Schedule.flow(tuple(scheduler.sigmas.tolist()), tuple(scheduler.timesteps.tolist()))


def ddim_schedule(config: Config, steps: int, image_tokens: int) -> Schedule:
    """``DDIMScheduler`` without noise; arguments and errors as :func:`schedule_of`.

    Source:
        arXiv:2010.02502, eq. 12, with eta 0.
    """
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    _require_steps(steps, config.get("num_train_timesteps", 1000))
    scheduler = DDIMScheduler.from_config(_diffusion_config(config))
    scheduler.set_timesteps(steps)
    rows = []
    for timestep in scheduler.timesteps.tolist():
        before = timestep - scheduler.config.num_train_timesteps // steps
        alpha = float(scheduler.alphas_cumprod[timestep])
        final = float(scheduler.final_alpha_cumprod)
        alpha_next = float(scheduler.alphas_cumprod[before]) if before >= 0 else final
        rows.append(_Diffusion(timestep=timestep, alpha=alpha, alpha_next=alpha_next))
    return Schedule(
        timesteps=tuple(float(row.timestep) for row in rows),
        sigmas=tuple(row.sigma for row in rows),
        a=tuple(math.sqrt(row.alpha_next) * row.p for row in rows),
        b=tuple(math.sqrt(row.alpha_next) * row.q + math.sqrt(1 - row.alpha_next) for row in rows),
        p=tuple(row.p for row in rows),
        q=tuple(row.q for row in rows),
    )


def ddpm_schedule(config: Config, steps: int, image_tokens: int) -> Schedule:
    """``DDPMScheduler``; arguments and errors as :func:`schedule_of`.

    Source:
        arXiv:2006.11239, eq. 7; learned variance arXiv:2102.09672, eq. 15.
    """
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    _require_steps(steps, config.get("num_train_timesteps", 1000))
    scheduler = DDPMScheduler.from_config(_diffusion_config(config))
    kind = scheduler.config.variance_type
    if kind not in _VARIANCES:
        raise ModelError(f"variance_type is {kind}; only {', '.join(_VARIANCES)} are supported")
    scheduler.set_timesteps(steps)
    rows = []
    for timestep in scheduler.timesteps.tolist():
        before = int(scheduler.previous_timestep(timestep))
        alpha = float(scheduler.alphas_cumprod[timestep])
        alpha_next = float(scheduler.alphas_cumprod[before]) if before >= 0 else 1.0
        rows.append(_Diffusion(timestep=timestep, alpha=alpha, alpha_next=alpha_next))
    return Schedule(
        timesteps=tuple(float(row.timestep) for row in rows),
        sigmas=tuple(row.sigma for row in rows),
        a=tuple(row.posterior_x + row.posterior_x0 * row.p for row in rows),
        b=tuple(row.posterior_x0 * row.q for row in rows),
        p=tuple(row.p for row in rows),
        q=tuple(row.q for row in rows),
        log_variance=tuple(_VARIANCES[kind](row) if row.timestep > 0 else None for row in rows),
    )


@dataclass(frozen=True, kw_only=True)
class _Diffusion:
    """One step of a diffusion that predicts epsilon, in the terms of arXiv:2006.11239."""

    timestep: int
    alpha: float
    """Cumulative product up to this step."""
    alpha_next: float
    """Likewise, up to the less noisy step that follows."""

    @property
    def sigma(self) -> float:
        return math.sqrt(1 - self.alpha)

    @property
    def p(self) -> float:
        return 1 / math.sqrt(self.alpha)

    @property
    def q(self) -> float:
        return -math.sqrt((1 - self.alpha) / self.alpha)

    @property
    def beta(self) -> float:
        return 1 - self.alpha / self.alpha_next

    @property
    def posterior_x0(self) -> float:
        return math.sqrt(self.alpha_next) * self.beta / (1 - self.alpha)

    @property
    def posterior_x(self) -> float:
        return math.sqrt(self.alpha / self.alpha_next) * (1 - self.alpha_next) / (1 - self.alpha)

    @property
    def small(self) -> float:
        """Log of the posterior variance."""
        return math.log(max((1 - self.alpha_next) / (1 - self.alpha) * self.beta, 1e-20))

    @property
    def large(self) -> float:
        return math.log(self.beta)


_VARIANCES: Mapping[str, Callable[[_Diffusion], tuple[float, float]]] = MappingProxyType(
    {
        "fixed_small": lambda row: (row.small, row.small),
        "fixed_large": lambda row: (row.large, row.large),
        "learned_range": lambda row: (row.small, row.large),
    }
)


def _require_steps(steps: int, most: int | None = None) -> None:
    if steps < 1:
        raise InputError(f"{steps} denoising steps were asked for; give at least 1")
    if most is not None and steps > most:
        raise InputError(f"{steps} denoising steps were asked for; this scheduler has at most {most}")


_LINEAR: Mapping[str, tuple[Any, Any]] = MappingProxyType(
    {
        "prediction_type": ("epsilon", "epsilon"),
        "clip_sample": (True, False),
        "thresholding": (False, False),
        # Epsilon says nothing where no signal is left.
        "rescale_betas_zero_snr": (False, False),
    }
)
"""Field of a configuration to diffusers' default and to what can be done here."""


def _diffusion_config(config: Config) -> dict[str, Any]:
    """Refuse what is not linear in the prediction, or not epsilon."""
    for name, (default, wanted) in _LINEAR.items():
        if (found := config.get(name, default)) != wanted:
            raise ModelError(f"{name} of the scheduler is {found}; only {wanted} is supported")
    return dict(config)


def _dynamic_shift(config: Config, image_tokens: int) -> float:
    """mu, linear in the number of image tokens (diffusers' ``calculate_shift``)."""
    low, high = config["base_image_seq_len"], config["max_image_seq_len"]
    slope = (config["max_shift"] - config["base_shift"]) / (high - low)
    return float(config["base_shift"] + slope * (image_tokens - low))


SAMPLERS: Mapping[str, Callable[[Config, int, int], Schedule]] = MappingProxyType(
    {
        "FlowMatchEulerDiscreteScheduler": flow_match_schedule,
        "DDIMScheduler": ddim_schedule,
        "DDPMScheduler": ddpm_schedule,
    }
)
"""diffusers' scheduler to (configuration, steps, image tokens) to its schedule."""
