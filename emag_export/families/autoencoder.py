"""diffusers' ``AutoencoderKL``, which several families share, as facts. Nothing here needs torch."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from emag_export.contract import GraphSpec, TensorSpec
from emag_export.families.family import Component, Config, Latents

__all__ = ["KL_DECODER", "KL_ENCODER", "kl_config", "kl_latents"]


def kl_config(*, scaling_factor: float, shift_factor: float) -> Mapping[str, Any]:
    """Configuration of the autoencoder with 16 channels, of which families have their own weights.

    Args:
        scaling_factor: Of its latents.
        shift_factor: Of its latents.
    """
    return MappingProxyType(
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
            "scaling_factor": scaling_factor,
            "shift_factor": shift_factor,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            "force_upcast": True,
        }
    )


def _factor(config: Config) -> int:
    return int(2 ** (len(config["block_out_channels"]) - 1))


def kl_latents(config: Config) -> Latents:
    """Scale and shift of the whole tensor."""
    return Latents(
        pixels_per_latent=_factor(config),
        scale=(float(config["scaling_factor"]),),
        shift=(float(config.get("shift_factor") or 0.0),),
    )


def _spec(name: str, config: Config, dtype: str) -> GraphSpec:
    factor = _factor(config)
    picture = ("rows", config["out_channels"], f"{factor}*h", f"{factor}*w")
    return GraphSpec(
        name=name,
        inputs=(
            TensorSpec(name="latent_sample", dtype=dtype, dims=("rows", config["latent_channels"], "h", "w")),
        ),
        outputs=(TensorSpec(name="sample", dtype=dtype, dims=picture),),
    )


def _force_upcast(config: Config) -> bool:
    """Some checkpoints overflow in float16 and say so; diffusers' own default for the flag is True."""
    return bool(config.get("force_upcast", True))


KL_DECODER = Component(
    name="vae_decoder",
    folder="vae",
    library="diffusers",
    model_class="AutoencoderKL",
    wrapper="emag_export.families.autoencoder_graph:KlDecoder",
    spec=_spec,
    example={"rows": 2, "h": 6, "w": 4},
    check=({"rows": 1, "h": 5, "w": 9}, {"rows": 3, "h": 8, "w": 6}),
    label="the decoder",
    note="all but input and output where the configuration says force_upcast, otherwise group norms: "
    "activations "
    "of some checkpoints exceed 65504",
    keeps_float32=_force_upcast,
    half_size=2.0,
)
"""An autoencoder that says ``force_upcast`` stays in float32 in a float16 bundle; its graph still takes and
gives float16. Some of diffusers' pipelines do the same, others ignore the flag."""

KL_ENCODER = "emag_export.families.autoencoder_graph:encode"
