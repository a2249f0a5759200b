"""Flux.1, dev and schnell: facts. Nothing here needs torch."""

from collections.abc import Callable

from emag_export.contract import GUIDANCE_INPUT, TensorSpec
from emag_export.families.autoencoder import KL_DECODER, KL_ENCODER, kl_latents
from emag_export.families.family import Config, Family, Shape
from emag_export.families.flux.components import CLIP, T5
from emag_export.families.flux.configs import CLASSES, CONFIGS, PARAMETERS, TOKEN_LIMITS
from emag_export.families.flux.models import MODELS, defaults_of
from emag_export.families.negatives import PUBLISHED
from emag_export.families.packed import packed_latents
from emag_export.models import SamplingDefaults
from emag_export.sizes import TextRange

__all__ = ["FLUX", "MAX_SIDE"]

MAX_SIDE = 512
"""Image tokens along a side that the tables of rotations in a graph cover: 8192 pixels."""

_NATIVE_SIDE = 128
"""Latents along a side of 1024 pixels, which no configuration says; ``FluxPipeline.default_sample_size``."""


def _shape(config: Config, precision: str) -> Shape:
    text, pooled = config["joint_attention_dim"], config["pooled_projection_dim"]

    def spec(name: str, *dims: int | str, dtype: str = precision) -> TensorSpec:
        return TensorSpec(name=name, dtype=dtype, dims=("trunk_rows", *dims))

    guidance = (spec(GUIDANCE_INPUT, dtype="float32"),) if config.get("guidance_embeds") else ()
    latents = packed_latents(config["in_channels"])
    return Shape(
        num_blocks=config["num_layers"] + config["num_single_layers"],
        heads=config["num_attention_heads"],
        head_dim=config["attention_head_dim"],
        latents=latents,
        out_channels=int(packed_latents(config.get("out_channels") or config["in_channels"])[0]),
        grid=("h", "w"),
        keys="h*w+text",
        conditioning=(
            spec("encoder_hidden_states", "text", text),
            spec("pooled_projections", pooled),
            *guidance,
        ),
        limits={"h": MAX_SIDE, "w": MAX_SIDE},
        native_side=_NATIVE_SIDE,
    )


def _text(config_of: Callable[[str], Config], defaults: SamplingDefaults) -> TextRange:
    """T5's tokens, always all of them."""
    tokens = defaults.max_sequence_length
    return TextRange(least=tokens, usual=tokens, most=tokens)


def _attentions(config: Config) -> int:
    return int(config["num_layers"] + config["num_single_layers"])


FLUX = Family(
    name="flux",
    title="Flux.1",
    pipelines=("FluxPipeline",),
    transformer="FluxTransformer2DModel",
    components=(CLIP, T5, KL_DECODER),
    decoder=KL_DECODER.name,
    encoder=KL_ENCODER,
    shape=_shape,
    latents=kl_latents,
    text=_text,
    longest_text=512,  # diffusers' pipeline takes no more
    sigmas="linear",
    annealed="encoder_hidden_states",
    attentions=_attentions,
    models=MODELS,
    negatives=PUBLISHED,
    defaults=defaults_of,
    configs=CONFIGS,
    classes=CLASSES,
    parameters=PARAMETERS,
    token_limits=TOKEN_LIMITS,
    vocabulary="tiny_sd3/model",
    vocabulary_folders={"tokenizer_2": "tokenizer_3"},
)
