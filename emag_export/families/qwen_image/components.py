"""Text encoder and autoencoder of Qwen-Image, as facts. Nothing here needs torch; their modules do."""

from emag_export.contract import GraphSpec, TensorSpec
from emag_export.families.family import Component, Config, Latents

__all__ = ["DECODER", "ENCODER", "TEMPLATE_TOKENS", "TEXT", "latents_of"]

TEMPLATE_TOKENS = 34
"""In front of every prompt; their states are dropped (``prompt_template_encode_start_idx``)."""


def _text_spec(name: str, config: Config, dtype: str) -> GraphSpec:
    # Older configurations are flat.
    width = (config.get("text_config") or config)["hidden_size"]
    wide = "float32" if dtype == "float16" else dtype
    return GraphSpec(
        name=name,
        inputs=(TensorSpec(name="input_ids", dtype="int64", dims=("rows", "tokens")),),
        outputs=(TensorSpec(name="last_hidden_state", dtype=wide, dims=("rows", "tokens", width)),),
    )


def _factor(config: Config) -> int:
    return int(2 ** len(config["temperal_downsample"]))


def latents_of(config: Config) -> Latents:
    """Mean and standard deviation of every channel."""
    return Latents(
        pixels_per_latent=_factor(config),
        scale=tuple(1 / float(deviation) for deviation in config["latents_std"]),
        shift=tuple(float(mean) for mean in config["latents_mean"]),
    )


def _decoder_spec(name: str, config: Config, dtype: str) -> GraphSpec:
    factor = _factor(config)
    picture = ("rows", 3, f"{factor}*h", f"{factor}*w")
    return GraphSpec(
        name=name,
        inputs=(TensorSpec(name="latent_sample", dtype=dtype, dims=("rows", config["z_dim"], "h", "w")),),
        outputs=(TensorSpec(name="sample", dtype=dtype, dims=picture),),
    )


def _always(config: Config) -> bool:
    return True


TEXT = Component(
    name="text_encoder",
    folder="text_encoder",
    library="transformers",
    model_class="Qwen2_5_VLForConditionalGeneration",
    wrapper="emag_export.families.qwen_image.text_encoder:TextEncoder",
    spec=_text_spec,
    example={"rows": 2, "tokens": 9},
    check=({"rows": 1, "tokens": 20}, {"rows": 3, "tokens": 7}),
    tokenizer="tokenizer",
    added_tokens=TEMPLATE_TOKENS,
    label="Qwen2.5-VL",
    note="all of it in a float16 bundle: it was trained in bfloat16, and its activations exceed 65504",
    keeps_float32=_always,
    half_size=2.0,
)
"""The part of Qwen2.5-VL that reads text."""

DECODER = Component(
    name="vae_decoder",
    folder="vae",
    library="diffusers",
    model_class="AutoencoderKLQwenImage",
    wrapper="emag_export.families.qwen_image.autoencoder:Decoder",
    spec=_decoder_spec,
    example={"rows": 2, "h": 6, "w": 4},
    check=({"rows": 1, "h": 5, "w": 9}, {"rows": 3, "h": 8, "w": 6}),
    label="the decoder",
    note="all but input and output in a float16 bundle: it was trained in bfloat16, and what its activations "
    "are in float16 has not been seen",
    keeps_float32=_always,
    half_size=2.0,
)

ENCODER = "emag_export.families.qwen_image.autoencoder:encode"
