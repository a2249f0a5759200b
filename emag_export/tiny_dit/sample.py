"""Pictures of tiny-dit: DDIM through diffusers' pipeline, and DDPM with the learned variance."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, DiTPipeline
from jaxtyping import UInt8

from emag_export.tiny_dit.networks import NULL_CLASS

DDIM_STEPS = 25
"""Enough for the pictures here; DiTPipeline takes 50 when none are asked for."""

DDPM_STEPS = 100
"""Noise that is added needs steps to be taken away again; the DiT paper takes 250."""

Pictures = UInt8[np.ndarray, "rows 64 64 3"]

_BATCH = 48


def ddim(
    pipeline: DiTPipeline, labels: list[int], scale: float, steps: int = DDIM_STEPS, seed: int = 0
) -> Pictures:
    """Make one picture per label with diffusers' own pipeline, which leaves the learned variance out.

    Args:
        pipeline: tiny-dit, from :func:`~.pipeline.load`.
        labels: Classes.
        scale: Guidance scale; 1 is none.
        steps: Denoising steps.
        seed: Seed of the first picture's noise; the next picture has the next seed.

    Returns:
        sRGB, 0 to 255.
    """
    parts = []
    for start in range(0, len(labels), _BATCH):
        part = labels[start : start + _BATCH]
        images = pipeline(
            part, guidance_scale=scale, num_inference_steps=steps, output_type="np",
            generator=_generators(seed + start, len(part)),
        ).images  # fmt: skip
        parts.append(np.rint(images * 255).astype(np.uint8))
    return np.concatenate(parts)


@torch.no_grad()
def ddpm(
    pipeline: DiTPipeline, labels: list[int], scale: float, steps: int = DDPM_STEPS, seed: int = 0
) -> Pictures:
    """Make one picture per label by ancestral sampling, with the variance the model predicts.

    Args:
        pipeline: tiny-dit.
        labels: Classes, sampled in one batch.
        scale: Guidance scale; 1 is none.
        steps: Denoising steps.
        seed: Seed of the first picture's noise; the next picture has the next seed.

    Returns:
        sRGB, 0 to 255.

    Source:
        arXiv:2102.09672, equation 15; guidance leaves the variance as the class predicts it.
    """
    scheduler: Any = DDPMScheduler.from_config(pipeline.scheduler.config, variance_type="learned_range")
    scheduler.set_timesteps(steps)
    generators = _generators(seed, len(labels))
    channels, size = pipeline.transformer.config.in_channels, pipeline.transformer.config.sample_size
    latents = torch.stack([torch.randn(channels, size, size, generator=one) for one in generators])
    classes = torch.tensor(labels)
    for timestep in scheduler.timesteps:
        times = timestep.expand(len(labels))
        output = pipeline.transformer(latents, timestep=times, class_labels=classes).sample
        if scale != 1:
            null = torch.full_like(classes, NULL_CLASS)
            uncond = pipeline.transformer(latents, timestep=times, class_labels=null).sample[:, :channels]
            guided = uncond + scale * (output[:, :channels] - uncond)
            output = torch.cat([guided, output[:, channels:]], dim=1)
        latents = scheduler.step(output, timestep, latents, generator=generators).prev_sample
    images = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    pixels = (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    return np.asarray(np.rint(pixels * 255).astype(np.uint8))


def _generators(seed: int, count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + row) for row in range(count)]
