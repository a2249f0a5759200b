"""The networks of tiny-dit: diffusers' DiT with small numbers, on the autoencoder of tiny-sd3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTTransformer2DModel
from torch import nn

from emag_export.tiny_dit.classes import CLASSES
from emag_export.tiny_sd3 import MODEL_DIR
from emag_export.tiny_sd3.networks import LATENT_CHANNELS, LATENT_SIZE
from emag_export.tiny_sd3.palette import COLOURS
from emag_export.tiny_sd3.scenes import SHAPES

NULL_CLASS = len(CLASSES)
"""Label of "no class", the last row of the label embeddings."""

TRANSFORMER: dict[str, Any] = {
    "sample_size": LATENT_SIZE,
    "patch_size": 2,
    "in_channels": LATENT_CHANNELS,
    "out_channels": 2 * LATENT_CHANNELS,
    "num_layers": 8,
    "attention_head_dim": 16,
    "num_attention_heads": 5,
    "num_embeds_ada_norm": len(CLASSES),
}


def make_transformer() -> DiTTransformer2DModel:
    """Build the transformer with fresh weights from torch's global generator.

    Blocks start as the identity and the output as zero (adaLN-zero, arXiv:2212.09748). The embedding of a
    class starts as the sum of one vector per shape and one per colour, so that classes share what they learn.
    """
    model = DiTTransformer2DModel(**TRANSFORMER)
    for block in model.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
        table = block.norm1.emb.class_embedder.embedding_table.weight
        shapes = 0.5 * torch.randn(len(SHAPES), 1, table.shape[1])
        colours = 0.5 * torch.randn(1, len(COLOURS), table.shape[1])
        with torch.no_grad():
            table[:NULL_CLASS] = (shapes + colours).flatten(0, 1)
            table[NULL_CLASS:] = 0
    for layer in (model.proj_out_1, model.proj_out_2):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model


def make_scheduler() -> DDIMScheduler:
    """Build the scheduler of DiT's pipelines: linear betas from 0.0001 to 0.02 in 1000 steps."""
    return DDIMScheduler(
        num_train_timesteps=1000, beta_start=0.0001, beta_end=0.02, beta_schedule="linear",
        clip_sample=False, prediction_type="epsilon",
    )  # fmt: skip


def load_vae(folder: Path = MODEL_DIR) -> AutoencoderKL:
    """Load an autoencoder, by default that of tiny-sd3.

    Args:
        folder: Folder of a pipeline.

    Returns:
        The autoencoder, float32, ready to use.
    """
    vae: AutoencoderKL = AutoencoderKL.from_pretrained(folder / "vae")
    return vae.eval().requires_grad_(False)
