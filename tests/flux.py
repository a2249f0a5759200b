"""A small Flux.1 with random weights, alone and as a pipeline that diffusers saved."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from emag_export.exporter.graph.fork import Forked, fork
from emag_export.families import FAMILIES
from emag_export.kinds import Variant
from emag_export.tiny_sd3 import MODEL_DIR

BLOCKS = (1, 2)
"""Candidates: the last double block and the first single one."""
TEXT, POOLED, TOKENS = 16, 8, 12


def small_flux(*, seed: int = 0, **config: Any) -> FluxTransformer2DModel:
    """Two double and two single random blocks, queries and keys scaled up: attention is not flat."""
    torch.manual_seed(seed)
    given: dict[str, Any] = {"in_channels": 16, "num_layers": 2, "num_single_layers": 2}
    given |= {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": TEXT}
    given |= {"pooled_projection_dim": POOLED, "guidance_embeds": True, "axes_dims_rope": (4, 6, 6), **config}
    model = FluxTransformer2DModel(**given).eval()
    for name, weight in model.named_parameters():
        if name.endswith(("norm_q.weight", "norm_k.weight", "norm_added_q.weight", "norm_added_k.weight")):
            weight.data *= 2.5
        elif weight.ndim > 1:
            weight.data *= 1.3
    return model.requires_grad_(False)


def flux_fork(variant: Variant = Variant.EMAG_Q, **config: Any) -> Forked:
    """The model with its fork."""
    model = small_flux(**config)
    return fork(model, FAMILIES["flux"].contract(model.config, variant=variant, blocks=BLOCKS))


def flux_pipeline(**config: Any) -> FluxPipeline:
    """All of its components, with the tokenizers of the embedded model."""
    torch.manual_seed(1)
    tokenizer = CLIPTokenizer.from_pretrained(MODEL_DIR / "tokenizer")
    tokenizer_2 = T5TokenizerFast.from_pretrained(MODEL_DIR / "tokenizer_3")
    clip = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=POOLED,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    t5 = T5Config(vocab_size=len(tokenizer_2), d_model=TEXT, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
        scaling_factor=0.4,
        shift_factor=0.1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    pipeline = FluxPipeline(
        transformer=small_flux(**config),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=CLIPTextModel(clip).eval(),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(t5).eval(),
        tokenizer_2=tokenizer_2,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_flux_pipeline(path: Path) -> None:
    """The pipeline as ``save_pretrained`` leaves it."""
    flux_pipeline().save_pretrained(path)
