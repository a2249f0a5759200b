"""A small Z-Image with random weights, alone and as a pipeline that diffusers saved."""

from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from torch import nn
from transformers import AutoTokenizer, Qwen3Config, Qwen3Model

from emag_export.exporter.graph.fork import Forked, fork
from emag_export.families import FAMILIES
from emag_export.kinds import Variant

BLOCKS, CANDIDATES, WIDTH = 5, (1, 2), 24
"""Of the trunk; the second is the width of the text encoder."""
TEXT = 64


def _sharpened(model: nn.Module) -> Any:
    """Attention that is not flat, and pad tokens that are not zero: replacing them would change nothing."""
    for name, weight in model.named_parameters():
        if name.endswith(("norm_q.weight", "norm_k.weight", "q_norm.weight", "k_norm.weight")):
            weight.data *= 2
        elif name.endswith("pad_token"):
            weight.data.normal_()
    return model.eval().requires_grad_(False)


def small_z_image(seed: int = 0) -> ZImageTransformer2DModel:
    """Five random blocks and one in each refiner."""
    torch.manual_seed(seed)
    model = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=BLOCKS,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[4, 6, 6],
        axes_lens=[128, 64, 64],
    )
    return _sharpened(model)


def z_image_fork(variant: Variant = Variant.EMAG_Q) -> Forked:
    """The model with its fork."""
    model = small_z_image()
    return fork(model, FAMILIES["z_image"].contract(model.config, variant=variant, blocks=CANDIDATES))


def small_qwen3() -> Qwen3Model:
    """Three layers, heads that share keys and values."""
    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=300,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    return _sharpened(Qwen3Model(config))


def z_image_pipeline() -> ZImagePipeline:
    """All of it, with the package's own small vocabulary."""
    torch.manual_seed(2)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    folder = Path(str(files("emag_export"))) / FAMILIES["z_image"].vocabulary / "tokenizer"
    return ZImagePipeline(
        transformer=small_z_image(),
        text_encoder=small_qwen3(),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def save_z_image_pipeline(path: Path) -> None:
    """The pipeline as ``save_pretrained`` leaves it."""
    z_image_pipeline().save_pretrained(path)
