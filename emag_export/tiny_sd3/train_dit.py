"""Second stage: the transformer and both text encoders, by flow matching on cached latents."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from emag_export.tiny_sd3.checkpoint import Plan, Stage, run_stage
from emag_export.tiny_sd3.dataset import Dataset
from emag_export.tiny_sd3.networks import JOINT_WIDTH, SHIFT, pin_seed
from emag_export.tiny_sd3.pad_token import PAD_COUNTS, PadBiasAttention

CAPTION_DROPOUT = 0.1
"""Share of captions replaced by the empty one, so that guidance has an unconditional prediction."""

COARSE_STEPS = 2800
"""Steps of fresh networks that train with SD3's shift alone, on what is where."""

FINE_SHIFTS: tuple[float, ...] = (SHIFT, 1.0, 1.0)
"""Timestep shifts after them, one of which each example gets; most have none and learn outlines.

At shift 3 only one example in forty has a noise level below 0.3, too few to learn clean outlines from.
"""

Latents = Float[Tensor, "rows channels height width"]
Ids = Int[Tensor, "rows tokens"]
Rows = Float[Tensor, " rows"]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One step's examples.

    Attributes:
        latents: Clean latents :math:`x_0`, after shift and scale.
        noise: Standard normal numbers of the same shape.
        sigma: Noise level, 0 to 1.
        ids: Token ids of the first tokenizer.
        ids_2: Token ids of the second tokenizer.
        pads: How many zero rows follow the text, the part of the third encoder SD3 would have.
    """

    latents: Latents
    noise: Latents
    sigma: Rows
    ids: Ids
    ids_2: Ids
    pads: Rows


def train_dit(  # noqa: PLR0913
    denoiser: nn.ModuleDict, data: Dataset, plan: Plan, batch: int, seed: int, out: Path, *,
    bfloat16: bool, coarse_steps: int,
) -> tuple[nn.ModuleDict, float] | None:  # fmt: skip
    """Train the transformer with both text encoders.

    Args:
        denoiser: Networks of :func:`~.networks.make_denoiser`, fresh or trained before.
        data: Latents and captions.
        plan: Steps and learning rate.
        batch: Examples per step.
        seed: The run's seed.
        out: Folder of the checkpoint.
        bfloat16: Whether matrix products run in bfloat16.
        coarse_steps: Steps before :data:`FINE_SHIFTS`: :data:`COARSE_STEPS` of fresh networks, else 0.

    Returns:
        The averaged networks and the seconds they took, or None when the run was asked to stop.
    """
    transformer: Any = denoiser["transformer"]
    transformer.set_attn_processor(PadBiasAttention())
    averaged = copy.deepcopy(denoiser).requires_grad_(False)
    matrices = [weight for weight in denoiser.parameters() if weight.ndim > 1]
    vectors = [weight for weight in denoiser.parameters() if weight.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, 0.99), fused=True)
    stage = Stage(model=denoiser, ema=averaged, optimizer=optimizer)

    def loss_of(step: int) -> Tensor:
        shifts = (SHIFT,) if step < coarse_steps else FINE_SHIFTS
        drawn = draw_batch(data, batch, shifts, pin_seed(seed, 2, step))
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            return flow_matching_loss(denoiser, drawn)

    if not run_stage(stage, plan, loss_of, out):
        return None
    return averaged.eval(), stage.seconds


def draw_batch(data: Dataset, count: int, shifts: tuple[float, ...], generator: torch.Generator) -> Batch:
    """Draw examples, noise, noise levels and the captions to drop.

    Noise levels are logit-normal and then shifted, as SD3 trains.

    Args:
        data: Latents and captions.
        count: Examples.
        shifts: Timestep shifts, one of which each example gets at random.
        generator: The only source of randomness.

    Returns:
        A batch.

    Source:
        arXiv:2403.03206, equations 19 (logit-normal) and 23 (shift).
    """
    rows = torch.randint(len(data.latents), (count,), generator=generator)
    style = torch.randint(data.ids.shape[1], (count,), generator=generator)
    drop = torch.rand(count, generator=generator) < CAPTION_DROPOUT
    level = torch.sigmoid(torch.randn(count, generator=generator))
    latents = data.latents[rows].float()
    noise = torch.randn(latents.shape, generator=generator)
    pads = torch.tensor(PAD_COUNTS)[torch.randint(len(PAD_COUNTS), (count,), generator=generator)]
    shift = torch.tensor(shifts)[torch.randint(len(shifts), (count,), generator=generator)]
    return Batch(
        latents=latents,
        noise=noise,
        sigma=shift * level / (1 + (shift - 1) * level),
        ids=torch.where(drop[:, None], data.empty_ids, data.ids[rows, style]).long(),
        ids_2=torch.where(drop[:, None], data.empty_ids_2, data.ids_2[rows, style]).long(),
        pads=pads.float(),
    )


def flow_matching_loss(denoiser: nn.ModuleDict, batch: Batch) -> Tensor:
    r"""Squared error of the predicted velocity :math:`\epsilon - x_0`.

    Args:
        denoiser: Transformer and text encoders.
        batch: Examples.

    Returns:
        The mean over rows and latent numbers, a scalar.

    Source:
        arXiv:2403.03206, equations 5 and 13, with the constant weighting of rectified flow.
    """
    sigma = batch.sigma[:, None, None, None]
    states, pooled = encode_text(denoiser, batch.ids, batch.ids_2)
    # One zero row stands for all of them: see pad_token.
    states = torch.cat([states, states.new_zeros(len(states), 1, JOINT_WIDTH)], dim=1)
    velocity = denoiser["transformer"](
        hidden_states=(1 - sigma) * batch.latents + sigma * batch.noise,
        encoder_hidden_states=states,
        pooled_projections=pooled,
        timestep=batch.sigma * 1000,
        joint_attention_kwargs={"pads": batch.pads},
        return_dict=False,
    )[0]
    return nn.functional.mse_loss(velocity.float(), batch.noise - batch.latents)


def encode_text(
    denoiser: nn.ModuleDict, ids: Ids, ids_2: Ids
) -> tuple[Float[Tensor, "rows tokens width"], Float[Tensor, "rows pooled"]]:
    """Encode captions as diffusers' SD3 pipeline does, without the zero rows of the absent third encoder.

    Args:
        denoiser: Text encoders.
        ids: Token ids of the first tokenizer.
        ids_2: Token ids of the second tokenizer.

    Returns:
        Second to last hidden states, side by side and zero-padded to ``JOINT_WIDTH``; pooled embeddings.

    Source:
        ``StableDiffusion3Pipeline.encode_prompt``, diffusers 0.42.
    """
    first = denoiser["text_encoder"](ids, output_hidden_states=True)
    second = denoiser["text_encoder_2"](ids_2, output_hidden_states=True)
    states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    states = nn.functional.pad(states, (0, JOINT_WIDTH - states.shape[-1]))
    return states, torch.cat([first.text_embeds, second.text_embeds], dim=-1)
