"""Configurations of the published Z-Image models, as facts: what random weights are made for.

Source:
    The ``config.json`` files of the repositories named in :mod:`emag_export.families.z_image.models`, reduced
    to what decides a graph; sizes of the transformer are the defaults of ``ZImageTransformer2DModel``.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from emag_export.families.autoencoder import kl_config

__all__ = ["CLASSES", "CONFIGS", "PARAMETERS", "TOKEN_LIMITS"]

Config = Mapping[str, Any]


def _transformer(heads: int = 30) -> Config:
    return MappingProxyType(
        {
            "_class_name": "ZImageTransformer2DModel",
            "all_patch_size": [2],
            "all_f_patch_size": [1],
            "in_channels": 16,
            "dim": 128 * heads,
            "n_layers": 30,
            "n_refiner_layers": 2,
            "n_heads": heads,
            "n_kv_heads": heads,
            "norm_eps": 1e-5,
            "qk_norm": True,
            "cap_feat_dim": 2560,
            "rope_theta": 256.0,
            "t_scale": 1000.0,
            "axes_dims": [32, 48, 48],
            "axes_lens": [1024, 512, 512],
        }
    )


_QWEN3_4B: Config = MappingProxyType(
    {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": True,
    }
)


def _pipeline(shift: float, transformer: Config) -> Mapping[str, Config]:
    scheduler = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": shift,
    }
    return MappingProxyType(
        {
            "transformer": transformer,
            "text_encoder": _QWEN3_4B,
            "vae": kl_config(scaling_factor=0.3611, shift_factor=0.1159),
            "scheduler": MappingProxyType(scheduler),
        }
    )


CONFIGS: Mapping[str, Mapping[str, Config]] = MappingProxyType(
    {
        "z-image": _pipeline(6.0, _transformer()),
        "z-image-turbo": _pipeline(3.0, _transformer()),
        # No published model: the depth of the others at a fifteenth of their width, to measure ratios.
        "z-image-narrow": _pipeline(6.0, _transformer(heads=2)),
    }
)
"""Known name to the configuration of every component."""

CLASSES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "transformer": ("diffusers", "ZImageTransformer2DModel"),
        "vae": ("diffusers", "AutoencoderKL"),
        "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
        "text_encoder": ("transformers", "Qwen3Model"),
        "tokenizer": ("transformers", "Qwen2Tokenizer"),
    }
)
"""Component to library and class, as ``model_index.json`` names them."""

TOKEN_LIMITS: Mapping[str, int] = MappingProxyType({"tokenizer": 131072})
"""``model_max_length`` of the tokenizer; how much is fed is a limit of the pipeline."""

PARAMETERS: Mapping[str, int] = MappingProxyType(
    {
        "z-image": 6_154_908_736,
        "z-image-turbo": 6_154_908_736,
        "z-image-narrow": 36_469_312,
        "text_encoder": 4_022_468_096,
        "vae": 83_819_683,
    }
)
"""Numbers stored for a model's transformer, and for the other components."""
