"""Configurations of the published Flux.1 models, as facts: what random weights are made for.

Source:
    The ``config.json`` files of the repositories named in :mod:`emag_export.families.flux.models`, reduced to
    what decides a graph.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from emag_export.families.autoencoder import kl_config
from emag_export.families.text_encoders import CLIP_L, CLIP_L_PARAMETERS, T5_XXL, T5_XXL_PARAMETERS

__all__ = ["CLASSES", "CONFIGS", "PARAMETERS", "TOKEN_LIMITS"]

Config = Mapping[str, Any]


def _transformer(*, guidance_embeds: bool, heads: int = 24, text: int = 4096) -> Config:
    return MappingProxyType(
        {
            "_class_name": "FluxTransformer2DModel",
            "patch_size": 1,
            "in_channels": 64,
            "num_layers": 19,
            "num_single_layers": 38,
            "attention_head_dim": 128,
            "num_attention_heads": heads,
            "joint_attention_dim": text,
            "pooled_projection_dim": 768,
            "guidance_embeds": guidance_embeds,
            "axes_dims_rope": [16, 56, 56],
        }
    )


def _scheduler(**settings: Any) -> Config:
    common = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
        "base_shift": 0.5,
        "max_shift": 1.15,
    }
    return MappingProxyType({**common, **settings})


def _pipeline(transformer: Config, scheduler: Config) -> Mapping[str, Config]:
    return MappingProxyType(
        {
            "transformer": transformer,
            "text_encoder": CLIP_L,
            "text_encoder_2": T5_XXL,
            "vae": kl_config(scaling_factor=0.3611, shift_factor=0.1159),
            "scheduler": scheduler,
        }
    )


_DYNAMIC = _scheduler(shift=3.0, use_dynamic_shifting=True)

CONFIGS: Mapping[str, Mapping[str, Config]] = MappingProxyType(
    {
        "flux.1-dev": _pipeline(_transformer(guidance_embeds=True), _DYNAMIC),
        "flux.1-schnell": _pipeline(_transformer(guidance_embeds=False), _scheduler(shift=1.0)),
        # No published model: the depth of the others at a twelfth of their width, to measure ratios.
        "flux-narrow": _pipeline(_transformer(guidance_embeds=True, heads=2, text=256), _DYNAMIC),
    }
)
"""Known name to the configuration of every component."""

CLASSES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "transformer": ("diffusers", "FluxTransformer2DModel"),
        "vae": ("diffusers", "AutoencoderKL"),
        "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
        "text_encoder": ("transformers", "CLIPTextModel"),
        "text_encoder_2": ("transformers", "T5EncoderModel"),
        "tokenizer": ("transformers", "CLIPTokenizer"),
        "tokenizer_2": ("transformers", "T5TokenizerFast"),
    }
)
"""Component to library and class, as ``model_index.json`` names them."""

TOKEN_LIMITS: Mapping[str, int] = MappingProxyType({"tokenizer": 77, "tokenizer_2": 512})
"""``model_max_length`` of the tokenizers."""

PARAMETERS: Mapping[str, int] = MappingProxyType(
    {
        "flux.1-dev": 11_901_408_320,
        "flux.1-schnell": 11_891_178_560,
        "flux-narrow": 83_210_816,
        "text_encoder": CLIP_L_PARAMETERS["pooled"],
        "text_encoder_2": T5_XXL_PARAMETERS,
        "vae": 83_819_683,
    }
)
"""Numbers stored for a model's transformer, and for the other components."""
