"""Configurations of the published Qwen-Image, as facts: what random weights are made for, without a download.

Source:
    arXiv:2508.02324, tables 1 and 2; the defaults of diffusers' ``QwenImageTransformer2DModel`` and
    ``AutoencoderKLQwenImage``, which are this model's. The text encoder is Qwen2.5-VL-7B (arXiv:2502.13923).
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

__all__ = ["CLASSES", "CONFIGS", "PARAMETERS", "TOKEN_LIMITS"]

Config = Mapping[str, Any]


def _transformer(heads: int = 24) -> Config:
    return MappingProxyType(
        {
            "_class_name": "QwenImageTransformer2DModel",
            "patch_size": 2,
            "in_channels": 64,
            "out_channels": 16,
            "num_layers": 60,
            "attention_head_dim": 128,
            "num_attention_heads": heads,
            "joint_attention_dim": 3584,
            "guidance_embeds": False,
            "axes_dims_rope": [16, 56, 56],
        }
    )


_TEXT: Config = MappingProxyType(
    {
        "model_type": "qwen2_5_vl_text",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "hidden_act": "silu",
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-6,
        "use_sliding_window": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }
)

_VISION: Config = MappingProxyType(
    {
        "model_type": "qwen2_5_vl_vision",
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }
)
"""Not exported: prompts are text."""

_TEXT_ENCODER: Config = MappingProxyType(
    {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "text_config": dict(_TEXT),
        "vision_config": dict(_VISION),
        "tie_word_embeddings": False,
    }
)

_VAE: Config = MappingProxyType(
    {
        "_class_name": "AutoencoderKLQwenImage",
        "base_dim": 96,
        "z_dim": 16,
        "dim_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "attn_scales": [],
        "temperal_downsample": [False, True, True],
        "dropout": 0.0,
        "latents_mean": [
            *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
            *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
        ],
        "latents_std": [
            *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
            *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
        ],
    }
)

_SCHEDULER: Config = MappingProxyType(
    {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": 1.0,
        "use_dynamic_shifting": True,
        "base_shift": 0.5,
        "max_shift": 0.9,
        "base_image_seq_len": 256,
        "max_image_seq_len": 8192,
        "shift_terminal": 0.02,
        "time_shift_type": "exponential",
    }
)


def _pipeline(transformer: Config) -> Mapping[str, Config]:
    return MappingProxyType(
        {
            "transformer": transformer,
            "text_encoder": _TEXT_ENCODER,
            "vae": _VAE,
            "scheduler": _SCHEDULER,
        }
    )


CONFIGS: Mapping[str, Mapping[str, Config]] = MappingProxyType(
    {
        "qwen-image": _pipeline(_transformer()),
        # No published model: the depth of the other at a twelfth of its width, to measure ratios.
        "qwen-narrow": _pipeline(_transformer(heads=2)),
    }
)
"""Known name to the configuration of every component."""

CLASSES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "transformer": ("diffusers", "QwenImageTransformer2DModel"),
        "vae": ("diffusers", "AutoencoderKLQwenImage"),
        "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
        "text_encoder": ("transformers", "Qwen2_5_VLForConditionalGeneration"),
        "tokenizer": ("transformers", "Qwen2Tokenizer"),
    }
)
"""Component to library and class, as ``model_index.json`` names them."""

TOKEN_LIMITS: Mapping[str, int] = MappingProxyType({"tokenizer": 131072})
"""``model_max_length`` of the tokenizer; the pipeline feeds 512 tokens of a prompt by default."""

PARAMETERS: Mapping[str, int] = MappingProxyType(
    {
        "qwen-image": 20_430_401_088,
        "qwen-narrow": 143_266_880,
        "text_encoder": 8_292_166_656,
        "vae": 126_892_531,
    }
)
"""Numbers stored for the transformer and for the other folders; 7_070_619_136 of the text encoder are
used."""
