"""First stage: the autoencoder, and the latents of the whole training set."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from emag_export.tiny_sd3.checkpoint import Plan, Stage, run_stage
from emag_export.tiny_sd3.networks import make_vae, pin_seed
from emag_export.tiny_sd3.palette import COLOURS
from emag_export.tiny_sd3.scenes import SHAPES, Item, Scene, draw, sample_scene

KL_WEIGHT = 1e-4
"""Weight of the KL term per latent number; only keeps the latents from drifting far from unit scale."""

Images = Float[Tensor, "rows 3 height width"]
Latents = Float[Tensor, "rows channels down across"]


def train_vae(
    plan: Plan, batch: int, seed: int, out: Path, *, bfloat16: bool
) -> tuple[AutoencoderKL, float] | None:
    """Train the autoencoder on freshly drawn pictures.

    Args:
        plan: Steps and learning rate.
        batch: Pictures per step.
        seed: The run's seed.
        out: Folder of the checkpoint.
        bfloat16: Whether convolutions run in bfloat16 (1.5 times faster where the CPU has avx512_bf16).

    Returns:
        The averaged autoencoder and the seconds it took, or None when the run was asked to stop.
    """
    torch.manual_seed(seed)
    vae = make_vae()
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=plan.learning_rate, betas=(0.9, 0.99), weight_decay=1e-3
    )
    averaged = copy.deepcopy(vae).requires_grad_(False)
    stage = Stage(model=vae, ema=averaged, optimizer=optimizer)

    def loss_of(step: int) -> Tensor:
        generator = pin_seed(seed, 1, step)
        rng = np.random.default_rng([seed, 1, step])
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            return vae_loss(vae, pictures(rng, batch), generator)

    if not run_stage(stage, plan, loss_of, out):
        return None
    return averaged.eval(), stage.seconds


def pictures(rng: np.random.Generator, count: int) -> Images:
    """Draw pictures to train the autoencoder on: half scenes, half crowds of objects.

    Args:
        rng: Source of the scenes.
        count: How many.

    Returns:
        sRGB, -1 to 1, 64 x 64.
    """
    half = count // 2
    scenes = [sample_scene(rng) for _ in range(half)] + [_crowd(rng) for _ in range(count - half)]
    return to_tensor(np.stack([draw(scene) for scene in scenes]))


def _crowd(rng: np.random.Generator) -> Scene:
    """Scatter 14 objects over each other: with edges and colours everywhere, the decoder learns faster."""
    items = tuple(
        Item(
            shape=str(rng.choice(SHAPES)), colour=str(rng.choice(COLOURS)), size="any",
            x=rng.uniform(-32, 32), y=rng.uniform(-32, 32), radius=rng.uniform(6.5, 20),
        )
        for _ in range(14)
    )  # fmt: skip
    return Scene(background=str(rng.choice(COLOURS)), items=items)


def to_tensor(images: np.ndarray) -> Images:
    """Turn 8-bit pictures, rows x height x width x 3, into the autoencoder's -1 to 1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1


def vae_loss(vae: AutoencoderKL, images: Images, generator: torch.Generator) -> Tensor:
    """L1, squared error, L1 of the horizontal and vertical differences (edges), and a slight KL.

    Args:
        vae: The autoencoder.
        images: sRGB, -1 to 1.
        generator: Source of the latent noise.

    Returns:
        The loss, a scalar.
    """
    posterior = vae.encode(images).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator)
    decoded = vae.decode(posterior.mean + posterior.std * noise).sample
    loss = functional.l1_loss(decoded, images) + functional.mse_loss(decoded, images)
    loss = loss + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()
    edges = [functional.l1_loss(decoded.diff(dim=axis), images.diff(dim=axis)) for axis in (2, 3)]
    total: Tensor = loss + 0.5 * edges[0] + 0.5 * edges[1]
    return total


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Images) -> Latents:
    """Encode pictures to the means of their latents, before shift and scale.

    Args:
        vae: The autoencoder.
        images: sRGB, -1 to 1.

    Returns:
        Latents of the autoencoder's own scale.
    """
    means: list[Tensor] = [vae.encode(chunk).latent_dist.mean for chunk in torch.split(images, 128)]
    return torch.cat(means).contiguous()


def measure_scales(latents: Latents) -> dict[str, float]:
    """Measure the config numbers that bring latents to zero mean and unit deviation.

    Args:
        latents: Encoded pictures.

    Returns:
        ``scaling_factor`` and ``shift_factor``, as :class:`diffusers.AutoencoderKL` names them.
    """
    return {"scaling_factor": 1 / float(latents.std()), "shift_factor": float(latents.mean())}
