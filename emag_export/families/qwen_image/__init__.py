"""Qwen-Image: facts. Nothing here needs torch.

Source:
    arXiv:2508.02324.
"""

from collections.abc import Callable

from emag_export.contract import TensorSpec
from emag_export.errors import ModelError
from emag_export.families.family import Config, Family, Shape
from emag_export.families.negatives import PUBLISHED
from emag_export.families.packed import packed_latents
from emag_export.families.qwen_image.components import DECODER, ENCODER, TEXT, latents_of
from emag_export.families.qwen_image.configs import CLASSES, CONFIGS, PARAMETERS, TOKEN_LIMITS
from emag_export.families.qwen_image.models import MODELS, NATIVE_SIDE, defaults_of
from emag_export.models import SamplingDefaults
from emag_export.sizes import TextRange

__all__ = ["QWEN_IMAGE"]

_LONGEST_TEXT = 1024
"""``QwenImagePipeline`` takes no more tokens of a prompt."""

_SIDE = 6144
"""Image tokens: positions end at 4095, those of the text begin at half of the longer side."""

_OTHERS = ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")
"""Settings of models of this class that edit pictures, make layers, or are distilled."""


def _shape(config: Config, precision: str) -> Shape:
    """The latents that the pipeline packs into patches.

    Raises:
        ModelError: If the transformer is one that edits pictures, makes layers, or is distilled.
    """
    if others := [name for name in _OTHERS if config.get(name)]:
        raise ModelError(
            f"the transformer has {', '.join(others)}, which makes no pictures of text alone; give the one "
            "of a Qwen-Image"
        )
    latents, text = packed_latents(config["in_channels"]), config["joint_attention_dim"]

    def spec(name: str, dtype: str, *dims: int | str, below: int | None = None) -> TensorSpec:
        return TensorSpec(name=name, dtype=dtype, dims=("trunk_rows", *dims), below=below)

    return Shape(
        num_blocks=config["num_layers"],
        heads=config["num_attention_heads"],
        head_dim=config["attention_head_dim"],
        latents=latents,
        out_channels=config.get("out_channels") or int(latents[0]),
        grid=("h", "w"),
        keys="h*w+text",
        conditioning=(
            spec("encoder_hidden_states", precision, "text", text),
            spec("encoder_hidden_states_mask", "int64", "text", below=2),
        ),
        limits={"h": _SIDE, "w": _SIDE, "text": _LONGEST_TEXT},
        native_side=NATIVE_SIDE,
    )


def _text(config_of: Callable[[str], Config], defaults: SamplingDefaults) -> TextRange:
    """Every prompt is filled up to the same length, and a mask hides what was added."""
    length = defaults.max_sequence_length
    return TextRange(least=1, usual=length, most=length)


def _attentions(config: Config) -> int:
    """A joint one per block."""
    return int(config["num_layers"])


QWEN_IMAGE = Family(
    name="qwen_image",
    title="Qwen-Image",
    pipelines=("QwenImagePipeline",),
    transformer="QwenImageTransformer2DModel",
    components=(TEXT, DECODER),
    decoder=DECODER.name,
    encoder=ENCODER,
    shape=_shape,
    latents=latents_of,
    text=_text,
    longest_text=_LONGEST_TEXT,
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
)
