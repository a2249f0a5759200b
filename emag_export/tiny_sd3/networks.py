"""The networks of tiny-sd3: the diffusers and transformers classes of SD3, with small numbers."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from emag_export.tiny_sd3.scenes import CANVAS

LATENT_CHANNELS = 8
LATENT_SIZE = CANVAS // 4
JOINT_WIDTH = 128
"""Width of the text sequence; the encoders give 48 + 64 channels, the rest is zero padding, as in SD3."""

SHIFT = 3.0
"""Timestep shift of SD3, used for training and for sampling (arXiv:2403.03206, section 5.3.2)."""

TRANSFORMER: dict[str, Any] = {
    "sample_size": LATENT_SIZE,
    "patch_size": 2,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "num_layers": 10,
    "attention_head_dim": 32,
    "num_attention_heads": 3,
    "joint_attention_dim": JOINT_WIDTH,
    "caption_projection_dim": 96,
    "pooled_projection_dim": 112,
    "pos_embed_max_size": 24,
    "qk_norm": "rms_norm",
}

VAE: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": LATENT_CHANNELS,
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (16, 32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": CANVAS,
    "mid_block_add_attention": False,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}

TEXT: tuple[dict[str, Any], dict[str, Any]] = (
    {"hidden_size": 48, "intermediate_size": 192, "projection_dim": 48, "num_attention_heads": 3,
     "num_hidden_layers": 3, "hidden_act": "quick_gelu"},
    {"hidden_size": 64, "intermediate_size": 256, "projection_dim": 64, "num_attention_heads": 4,
     "num_hidden_layers": 3, "hidden_act": "gelu"},
)  # fmt: skip
"""The two text encoders; the second to last of three layers is what the transformer reads."""


def make_vae(**scales: float) -> AutoencoderKL:
    """Build the autoencoder: 64 x 64 sRGB to 16 x 16 latents of 8 channels.

    Args:
        **scales: ``scaling_factor`` and ``shift_factor``, once they are measured.

    Returns:
        An autoencoder with fresh weights from torch's global generator.
    """
    vae = AutoencoderKL(**VAE, **scales)
    # Start with a posterior deviation of 0.08: at diffusers' 1, noise drowns the picture for 1000 steps.
    nn.init.zeros_(vae.encoder.conv_out.weight[LATENT_CHANNELS:])
    nn.init.constant_(vae.encoder.conv_out.bias[LATENT_CHANNELS:], -5.0)
    return vae


def make_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Build SD3's scheduler: 1000 training timesteps, shift :data:`SHIFT`."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=SHIFT)


def make_denoiser(vocabulary: int, eos_id: int, bos_id: int, text_length: int) -> nn.ModuleDict:
    """Build what is trained together in the second stage.

    Args:
        vocabulary: Number of tokens.
        eos_id: Token that ends a caption and fills the rest of the sequence.
        bos_id: Token that starts a caption.
        text_length: Tokens in a sequence, with start, end and filling.

    Returns:
        ``transformer``, ``text_encoder`` and ``text_encoder_2``, fresh from torch's global generator.
    """
    encoders = []
    for row in TEXT:
        config = CLIPTextConfig(
            vocab_size=vocabulary, max_position_embeddings=text_length,
            bos_token_id=bos_id, eos_token_id=eos_id, pad_token_id=eos_id, **row,
        )  # fmt: skip
        encoder = CLIPTextModelWithProjection(config)
        encoder.set_attn_implementation("eager")  # see pad_token: the fused backward pass is slow on a CPU
        encoders.append(encoder)
    transformer = SD3Transformer2DModel(**TRANSFORMER)
    _start_well(transformer, encoders)
    return nn.ModuleDict(
        {"transformer": transformer, "text_encoder": encoders[0], "text_encoder_2": encoders[1]}
    )


def _start_well(transformer: SD3Transformer2DModel, encoders: list[CLIPTextModelWithProjection]) -> None:
    """Start with closed gates (adaLN-zero, arXiv:2212.09748) and with words loud enough to be heard.

    CLIP's embeddings start at a deviation of 0.02, which their reader would take long to amplify.
    """
    for name, layer in transformer.named_modules():
        if isinstance(layer, nn.Linear) and (
            name.endswith(("norm1.linear", "norm1_context.linear", "norm_out.linear"))
        ):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    nn.init.zeros_(transformer.proj_out.weight)
    for encoder in encoders:
        nn.init.normal_(encoder.text_model.embeddings.token_embedding.weight, std=0.7)
        nn.init.normal_(encoder.text_model.embeddings.position_embedding.weight, std=0.3)


def count_parameters(module: nn.Module) -> int:
    """Count the trainable numbers of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def pin_seed(seed: int, *stream: int) -> torch.Generator:
    """Make a generator that depends only on the seed and a place in the run, so a resumed run repeats itself.

    Args:
        seed: The run's seed.
        *stream: What the numbers are for: a stage number, a step.

    Returns:
        A CPU generator.
    """
    mixed = seed
    for part in stream:
        mixed = (mixed * 1_000_003 + part + 0x9E3779B9) % (2**63 - 1)
    return torch.Generator().manual_seed(mixed)
