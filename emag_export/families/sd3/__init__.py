"""Stable Diffusion 3 and 3.5: facts. Nothing here needs torch."""

from collections.abc import Callable

from emag_export.contract import TensorSpec
from emag_export.families.autoencoder import KL_DECODER, KL_ENCODER, kl_latents
from emag_export.families.family import Config, Family, Shape
from emag_export.families.negatives import PUBLISHED
from emag_export.families.sd3.components import CLIP_G, CLIP_L, T5
from emag_export.families.sd3.configs import CLASSES, CONFIGS, PARAMETERS, TOKEN_LIMITS
from emag_export.families.sd3.models import MODELS, defaults_of
from emag_export.models import SamplingDefaults
from emag_export.sizes import TextRange

__all__ = ["SD3"]


def _shape(config: Config, precision: str) -> Shape:
    patch, side = config["patch_size"], config["pos_embed_max_size"]
    text, pooled = config["joint_attention_dim"], config["pooled_projection_dim"]

    def spec(name: str, *dims: int | str) -> TensorSpec:
        return TensorSpec(name=name, dtype=precision, dims=("trunk_rows", *dims))

    return Shape(
        num_blocks=config["num_layers"],
        heads=config["num_attention_heads"],
        head_dim=config["attention_head_dim"],
        latents=(config["in_channels"], f"{patch}*h", f"{patch}*w"),
        out_channels=config.get("out_channels") or config["in_channels"],
        grid=("h", "w"),
        keys="h*w+text",
        conditioning=(spec("encoder_hidden_states", "text", text), spec("pooled_projections", pooled)),
        limits={"h": side, "w": side},
        native_side=config["sample_size"],
    )


def _text(config_of: Callable[[str], Config], defaults: SamplingDefaults) -> TextRange:
    """CLIP's tokens, always all of them, and T5's behind them; zeros stand in for a T5 that is left out."""
    clip = int(config_of("text_encoder")["max_position_embeddings"])
    usual = clip + defaults.max_sequence_length
    return TextRange(least=clip, usual=usual, most=usual)


def _attentions(config: Config) -> int:
    """A joint one per block, and SD3.5's second one where it is."""
    return int(config["num_layers"]) + len(config.get("dual_attention_layers") or ())


SD3 = Family(
    name="sd3",
    title="SD3 and SD3.5",
    pipelines=("StableDiffusion3Pipeline",),
    transformer="SD3Transformer2DModel",
    components=(CLIP_L, CLIP_G, T5, KL_DECODER),
    decoder=KL_DECODER.name,
    encoder=KL_ENCODER,
    shape=_shape,
    latents=kl_latents,
    text=_text,
    longest_text=512,  # diffusers' pipeline takes no more T5 tokens
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
    single_file="emag_export.families.sd3.single_file:open_single_file",
)
