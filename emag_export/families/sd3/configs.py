"""Configurations of the published SD3 models, as facts: what random weights are made for, without a download.

Source:
    The ``config.json`` files of the repositories named in :mod:`emag_export.families.sd3.models`, reduced to
    what decides a graph. Widths and depths are also in the papers: arXiv:2403.03206 (SD3), arXiv:2103.00020
    (CLIP), arXiv:1910.10683 (T5).
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

__all__ = ["CLASSES", "CONFIGS", "PARAMETERS", "TOKEN_LIMITS"]

Config = Mapping[str, Any]


def _clip(**sizes: Any) -> Config:
    common = {
        "architectures": ["CLIPTextModelWithProjection"],
        "model_type": "clip_text_model",
        "vocab_size": 49408,
        "max_position_embeddings": 77,
        "layer_norm_eps": 1e-5,
        # The historical id: with it, transformers pools at the largest token, which is the end token.
        "eos_token_id": 2,
        "bos_token_id": 0,
        "pad_token_id": 1,
    }
    return MappingProxyType({**common, **sizes})


_CLIP_L = _clip(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    projection_dim=768,
    hidden_act="quick_gelu",
)
_CLIP_BIG_G = _clip(
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=20,
    projection_dim=1280,
    hidden_act="gelu",
)
_T5_XXL: Config = MappingProxyType(
    {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "d_model": 4096,
        "d_ff": 10240,
        "d_kv": 64,
        "num_heads": 64,
        "num_layers": 24,
        "vocab_size": 32128,
        "feed_forward_proj": "gated-gelu",
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
        "is_encoder_decoder": False,
        "use_cache": False,
        "tie_word_embeddings": False,
    }
)
_VAE: Config = MappingProxyType(
    {
        "_class_name": "AutoencoderKL",
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 16,
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "act_fn": "silu",
        "sample_size": 1024,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "force_upcast": True,
    }
)


def _transformer(**sizes: Any) -> Config:
    common = {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "attention_head_dim": 64,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 192,
        "qk_norm": None,
        "dual_attention_layers": [],
    }
    return MappingProxyType({**common, **sizes})


_TRANSFORMERS = {
    "sd3": _transformer(num_layers=24, num_attention_heads=24, caption_projection_dim=1536),
    "sd3.5-medium": _transformer(
        num_layers=24,
        num_attention_heads=24,
        caption_projection_dim=1536,
        pos_embed_max_size=384,
        qk_norm="rms_norm",
        dual_attention_layers=list(range(13)),
    ),
    "sd3.5-large": _transformer(
        num_layers=38, num_attention_heads=38, caption_projection_dim=2432, qk_norm="rms_norm"
    ),
}
# No published model: SD3's depth at a quarter of its width, to measure ratios where the real one is too slow.
_TRANSFORMERS["sd3-narrow"] = _transformer(num_layers=24, num_attention_heads=6, caption_projection_dim=384)
_TRANSFORMERS["sd3.5-large-turbo"] = _TRANSFORMERS["sd3.5-large"]


def _pipeline(transformer: Config) -> Mapping[str, Config]:
    return MappingProxyType(
        {
            "transformer": transformer,
            "text_encoder": _CLIP_L,
            "text_encoder_2": _CLIP_BIG_G,
            "text_encoder_3": _T5_XXL,
            "vae": _VAE,
            "scheduler": MappingProxyType(
                {
                    "_class_name": "FlowMatchEulerDiscreteScheduler",
                    "num_train_timesteps": 1000,
                    "shift": 3.0,
                }
            ),
        }
    )


CONFIGS: Mapping[str, Mapping[str, Config]] = MappingProxyType(
    {name: _pipeline(transformer) for name, transformer in _TRANSFORMERS.items()}
)
"""Known name to the configuration of every component."""

CLASSES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "transformer": ("diffusers", "SD3Transformer2DModel"),
        "vae": ("diffusers", "AutoencoderKL"),
        "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
        "text_encoder": ("transformers", "CLIPTextModelWithProjection"),
        "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
        "text_encoder_3": ("transformers", "T5EncoderModel"),
        "tokenizer": ("transformers", "CLIPTokenizer"),
        "tokenizer_2": ("transformers", "CLIPTokenizer"),
        "tokenizer_3": ("transformers", "T5Tokenizer"),
    }
)
"""Component to library and class, as ``model_index.json`` names them."""

TOKEN_LIMITS: Mapping[str, int] = MappingProxyType({"tokenizer": 77, "tokenizer_2": 77, "tokenizer_3": 512})
"""``model_max_length`` of the tokenizers; T5's is a limit of the pipeline, which feeds 256 by default."""

PARAMETERS: Mapping[str, int] = MappingProxyType(
    {
        "sd3": 2_084_951_104,
        "sd3-narrow": 143_013_184,
        "sd3.5-medium": 2_469_663_936,
        "sd3.5-large": 8_146_280_768,
        "sd3.5-large-turbo": 8_146_280_768,
        "text_encoder": 123_650_304,
        "text_encoder_2": 694_659_840,
        "text_encoder_3": 4_762_310_656,
        "vae": 83_819_683,
    }
)
"""Numbers stored for a model's transformer, positional embedding included, and for the other components."""
