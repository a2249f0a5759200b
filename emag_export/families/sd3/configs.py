"""Configurations of the published SD3 models, as facts: what random weights are made for, without a download.

Source:
    The ``config.json`` files of the repositories named in :mod:`emag_export.families.sd3.models`, reduced to
    what decides a graph. Widths and depths are also in arXiv:2403.03206.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from emag_export.families.autoencoder import kl_config
from emag_export.families.text_encoders import (
    CLIP_L,
    CLIP_L_PARAMETERS,
    T5_XXL,
    T5_XXL_PARAMETERS,
    clip_config,
)

__all__ = ["CLASSES", "CONFIGS", "PARAMETERS", "TOKEN_LIMITS"]

Config = Mapping[str, Any]


_CLIP_BIG_G = clip_config(
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=20,
    projection_dim=1280,
    hidden_act="gelu",
)
_VAE = kl_config(scaling_factor=1.5305, shift_factor=0.0609)


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
            "text_encoder": CLIP_L,
            "text_encoder_2": _CLIP_BIG_G,
            "text_encoder_3": T5_XXL,
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
        "text_encoder": CLIP_L_PARAMETERS["projected"],
        "text_encoder_2": 694_659_840,
        "text_encoder_3": T5_XXL_PARAMETERS,
        "vae": 83_819_683,
    }
)
"""Numbers stored for a model's transformer, positional embedding included, and for the other components."""
