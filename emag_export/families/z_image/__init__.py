"""Z-Image, base and Turbo: facts. Nothing here needs torch.

Source:
    arXiv:2511.22699, and diffusers' ``ZImagePipeline`` and ``ZImageTransformer2DModel``.
"""

from collections.abc import Callable

from emag_export.contract import TensorSpec
from emag_export.families.autoencoder import KL_DECODER, KL_ENCODER, kl_latents
from emag_export.families.family import Config, Family, Shape
from emag_export.families.negatives import PUBLISHED
from emag_export.families.packed import PATCH
from emag_export.families.z_image.components import QWEN3
from emag_export.families.z_image.configs import CLASSES, CONFIGS, PARAMETERS, TOKEN_LIMITS
from emag_export.families.z_image.models import MODELS, defaults_of
from emag_export.models import SamplingDefaults
from emag_export.sizes import TextRange

__all__ = ["Z_IMAGE"]

_MULTIPLE = 32
"""Captions and images are filled up to a multiple of so many tokens."""

_NATIVE_SIDE = 128
"""Latents along a side of 1024 pixels, which no configuration says; what ``ZImagePipeline`` draws."""


def _whole(tokens: int) -> int:
    return -(-tokens // _MULTIPLE) * _MULTIPLE


def _longest(positions: int) -> int:
    """Caption tokens, fillers included: they begin at position 1, and the image stands behind them."""
    return (positions - 2) // _MULTIPLE * _MULTIPLE


def _shape(config: Config, precision: str) -> Shape:
    mask = TensorSpec(name="encoder_hidden_states_mask", dtype="int64", dims=("trunk_rows", "text"), below=2)
    text = TensorSpec(
        name="encoder_hidden_states", dtype=precision, dims=("trunk_rows", "text", config["cap_feat_dim"])
    )
    caption, height, width = config["axes_lens"]
    return Shape(
        num_blocks=config["n_layers"],
        heads=config["n_heads"],
        head_dim=config["dim"] // config["n_heads"],
        latents=(config["in_channels"], f"{PATCH}*h", f"{PATCH}*w"),
        out_channels=config["in_channels"],
        grid=("h", "w"),
        keys="h*w+text",
        conditioning=(text, mask),
        limits={"h": height, "w": width, "text": _longest(caption)},
        multiples={"h*w": _MULTIPLE, "text": _MULTIPLE},
        native_side=_NATIVE_SIDE,
    )


def _text(config_of: Callable[[str], Config], defaults: SamplingDefaults) -> TextRange:
    """As many tokens for every prompt; the mask says which are real. A pipeline may be opened with fewer."""
    tokens = _whole(defaults.max_sequence_length)
    return TextRange(least=_MULTIPLE, usual=tokens, most=tokens)


def _attentions(config: Config) -> int:
    """One per block, and in both refiners."""
    return int(config["n_layers"] + 2 * config["n_refiner_layers"])


Z_IMAGE = Family(
    name="z_image",
    title="Z-Image",
    pipelines=("ZImagePipeline",),
    transformer="ZImageTransformer2DModel",
    components=(QWEN3, KL_DECODER),
    decoder=KL_DECODER.name,
    encoder=KL_ENCODER,
    shape=_shape,
    latents=kl_latents,
    text=_text,
    longest_text=_longest(1024),
    sigmas="linear",
    annealed="encoder_hidden_states",
    unguided="its pipeline calls the transformer with lists of pictures and of captions, not with rows",
    attentions=_attentions,
    models=MODELS,
    negatives=PUBLISHED,
    defaults=defaults_of,
    configs=CONFIGS,
    classes=CLASSES,
    parameters=PARAMETERS,
    token_limits=TOKEN_LIMITS,
    vocabulary="families/z_image/vocabulary",
)
