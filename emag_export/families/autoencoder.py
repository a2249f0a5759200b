"""diffusers' ``AutoencoderKL``, which several families share, as facts. Nothing here needs torch."""

from emag_export.contract import GraphSpec, TensorSpec
from emag_export.families.family import Component, Config, Latents

__all__ = ["KL_DECODER", "KL_ENCODER", "kl_latents"]


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
