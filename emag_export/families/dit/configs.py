"""Configurations of the published DiT models, as facts: what random weights are made for, without a download.

Source:
    diffusers' ``scripts/convert_dit_to_diffusers.py``, which made the repositories named in
    :mod:`emag_export.families.dit.models`; widths and depths also in arXiv:2212.09748, table 1. The
    autoencoder is Stable Diffusion's (arXiv:2112.10752).
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

__all__ = ["CLASSES", "CONFIGS", "PARAMETERS"]

Config = Mapping[str, Any]


def _transformer(sample_size: int, heads: int = 16) -> Config:
    return MappingProxyType(
        {
            "_class_name": "DiTTransformer2DModel",
            "sample_size": sample_size,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 28,
            "num_attention_heads": heads,
            "attention_head_dim": 72,
            "attention_bias": True,
            "activation_fn": "gelu-approximate",
            "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_zero",
            "norm_elementwise_affine": False,
            "norm_eps": 1e-5,
        }
    )


_VAE: Config = MappingProxyType(
    {
        "_class_name": "AutoencoderKL",
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "act_fn": "silu",
        "sample_size": 256,
        "scaling_factor": 0.18215,
    }
)
_SCHEDULER: Config = MappingProxyType(
    {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": 1000,
        "beta_schedule": "linear",
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "prediction_type": "epsilon",
        "clip_sample": False,
    }
)

_TRANSFORMERS = {
    **{f"dit-xl-2-{side}": _transformer(side // 8) for side in (256, 512)},
    # No published model: the depth of the others at a quarter of their width, to measure ratios.
    "dit-narrow": _transformer(32, heads=4),
}

CONFIGS: Mapping[str, Mapping[str, Config]] = MappingProxyType(
    {
        name: MappingProxyType({"transformer": transformer, "vae": _VAE, "scheduler": _SCHEDULER})
        for name, transformer in _TRANSFORMERS.items()
    }
)
"""Known name to the configuration of every component."""

CLASSES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "transformer": ("diffusers", "DiTTransformer2DModel"),
        "vae": ("diffusers", "AutoencoderKL"),
        "scheduler": ("diffusers", "DDIMScheduler"),
    }
)
"""Component to library and class, as ``model_index.json`` names them."""

PARAMETERS: Mapping[str, int] = MappingProxyType(
    {
        "dit-xl-2-256": 749_826_464,
        "dit-xl-2-512": 749_826_464,
        "dit-narrow": 54_580_352,
        "vae": 83_653_863,
    }
)
"""Numbers stored for a model's transformer, with every block's own embedding, and for the other folder."""
