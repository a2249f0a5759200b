"""A small Qwen-Image with random weights, alone and as a pipeline that diffusers saved."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from emag_export.exporter.graph.fork import Forked, fork
from emag_export.families import FAMILIES
from emag_export.families.qwen_image.prompt import AFTER, BEFORE
from emag_export.kinds import Variant

FLOW = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
}
"""The published scheduler."""

WIDTH = 32
"""Of the text encoder's hidden states."""

_WORDS = "a red circle on the blue square small green ring large"
_SPECIAL = ["<|im_start|>", "<|im_end|>"]


def small_qwen_image(*, seed: int = 0, **config: Any) -> QwenImageTransformer2DModel:
    """Four random blocks, queries and keys scaled up: flat attention would hide what replacing it does.

    Args:
        seed: Of the weights.
        config: What differs.
    """
    torch.manual_seed(seed)
    given: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 4,
        "in_channels": 16,
    }
    given |= {"out_channels": 4, "joint_attention_dim": WIDTH, "axes_dims_rope": (4, 6, 6), **config}
    model = QwenImageTransformer2DModel(**given).eval()
    for name, weight in model.named_parameters():
        if name.endswith(("norm_q.weight", "norm_k.weight", "norm_added_q.weight", "norm_added_k.weight")):
            weight.data *= 2.5
        elif weight.ndim > 1:
            weight.data *= 1.5
    return model.requires_grad_(False)


def qwen_image_fork(variant: Variant = Variant.EMAG_Q, *, precision: str = "float32") -> Forked:
    """The model with its fork; blocks 1 and 2 are candidates."""
    model, family = small_qwen_image().to(getattr(torch, precision)), FAMILIES["qwen_image"]
    return fork(model, family.contract(model.config, variant=variant, blocks=(1, 2), precision=precision))


def small_tokenizer() -> Qwen2Tokenizer:
    """Learned from the pipeline's own template, so that its beginning has 34 tokens here as well."""
    trained = Qwen2Tokenizer().train_new_from_iterator(
        [f"{BEFORE}{_WORDS}{AFTER}"] * 4, vocab_size=600, new_special_tokens=_SPECIAL, show_progress=False
    )
    trained.model_max_length = 2048
    return trained


def small_text_encoder(tokens: int) -> Qwen2_5_VLForConditionalGeneration:
    """Two layers, four heads on two keys and values, and a vision tower that nothing needs."""
    torch.manual_seed(1)
    config = Qwen2_5_VLForConditionalGeneration.config_class(
        text_config={
            "hidden_size": WIDTH,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": tokens,
            "max_position_embeddings": 2048,
            "bos_token_id": None,
            "eos_token_id": 0,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
        },
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
        | {"out_hidden_size": WIDTH, "fullatt_block_indexes": [0]},
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval().requires_grad_(False)


def small_autoencoder() -> AutoencoderKLQwenImage:
    """Two times smaller, four channels."""
    torch.manual_seed(2)
    model = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[-0.2, 0.1, 0.4, 0.0],
        latents_std=[1.5, 0.8, 1.2, 1.0],
    )
    return model.eval().requires_grad_(False)


def small_pipeline() -> QwenImagePipeline:
    """All of it, without a progress bar."""
    tokenizer = small_tokenizer()
    pipeline = QwenImagePipeline(
        transformer=small_qwen_image(),
        text_encoder=small_text_encoder(len(tokenizer)),
        tokenizer=tokenizer,
        vae=small_autoencoder(),
        scheduler=FlowMatchEulerDiscreteScheduler.from_config(FLOW),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_qwen_image_pipeline(path: Path) -> None:
    """The pipeline as ``save_pretrained`` leaves it."""
    small_pipeline().save_pretrained(path)
