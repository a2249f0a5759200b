"""Noise levels of a run, computed by diffusers' own scheduler from the checkpoint's configuration."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from emag_export.errors import InputError, ModelError

__all__ = ["Schedule", "flow_match_schedule"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Noise levels, exact float32 values held as Python floats.

    ``sigmas`` has one entry more than ``timesteps``: the last one is 0, the finished image.
    """

    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]

    @property
    def steps(self) -> int:
        """Number of denoising steps."""
        return len(self.timesteps)

    @property
    def sigma_steps(self) -> tuple[float, ...]:
        """sigma[i+1] - sigma[i], subtracted in float32 as diffusers does."""
        return tuple(torch.tensor(self.sigmas).diff().tolist())


def flow_match_schedule(config: Mapping[str, Any], steps: int, image_tokens: int) -> Schedule:
    """Sigmas and timesteps of ``FlowMatchEulerDiscreteScheduler`` with this configuration.

    Args:
        config: ``scheduler_config.json`` of the checkpoint.
        steps: Number of denoising steps, at least 1.
        image_tokens: Image tokens per row; dynamic shifting depends on it, as in diffusers' SD3 pipeline.

    Raises:
        InputError: If ``steps`` is below 1.
        ModelError: If the configuration is not deterministic flow-matching Euler.
    """
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    if steps < 1:
        raise InputError(f"{steps} denoising steps were asked for; give at least 1")
    kind = config.get("_class_name", "FlowMatchEulerDiscreteScheduler")
    if kind != "FlowMatchEulerDiscreteScheduler":
        raise ModelError(f"the scheduler is {kind}; only FlowMatchEulerDiscreteScheduler is supported")
    if config.get("stochastic_sampling") or config.get("invert_sigmas"):
        raise ModelError("stochastic_sampling and invert_sigmas are not supported; set both to false")
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(dict(config))
    mu = None
    if scheduler.config.use_dynamic_shifting:
        mu = _dynamic_shift(scheduler.config, image_tokens)
    scheduler.set_timesteps(steps, mu=mu)
    if not torch.isfinite(scheduler.sigmas).all():
        raise InputError(
            f"this scheduler configuration gives no finite noise levels for {steps} steps; take more"
        )
    return Schedule(sigmas=tuple(scheduler.sigmas.tolist()), timesteps=tuple(scheduler.timesteps.tolist()))


def _dynamic_shift(config: Mapping[str, Any], image_tokens: int) -> float:
    """mu, linear in the number of image tokens (diffusers' ``calculate_shift``)."""
    low, high = config["base_image_seq_len"], config["max_image_seq_len"]
    slope = (config["max_shift"] - config["base_shift"]) / (high - low)
    return float(config["base_shift"] + slope * (image_tokens - low))
