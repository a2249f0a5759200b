"""DiT, diffusion transformers that are prompted by class: facts. Nothing here needs torch.

Source:
    arXiv:2212.09748.
"""

from collections.abc import Callable, Mapping
from typing import Any

from emag_export.contract import TensorSpec
from emag_export.errors import ModelError
from emag_export.families.autoencoder import KL_DECODER, KL_ENCODER, kl_latents
from emag_export.families.dit.configs import CLASSES, CONFIGS, PARAMETERS
from emag_export.families.dit.models import MODELS, defaults_of
from emag_export.families.family import Config, Family, Shape
from emag_export.families.negatives import PUBLISHED
from emag_export.labels import ClassLabels
from emag_export.models import SamplingDefaults
from emag_export.sizes import TextRange

__all__ = ["DIT"]

_LEGACY = "Transformer2DModel"
"""Class that the published checkpoints name: diffusers took DiT out of it in 0.28."""


def _shape(config: Config, precision: str) -> Shape:
    """One square grid: diffusers' positional embedding and its way back from patches to pixels know no other.

    Raises:
        ModelError: If the transformer is another of those that were called ``Transformer2DModel``.
    """
    norm, classes = config.get("norm_type"), config.get("num_embeds_ada_norm")
    if norm != "ada_norm_zero" or not classes or not config.get("sample_size"):
        raise ModelError(
            f"the transformer is no DiT: norm_type is {norm}, num_embeds_ada_norm {classes} and sample_size "
            f"{config.get('sample_size')}, wanted are ada_norm_zero and two numbers; give another model"
        )
    side = config["sample_size"] // config["patch_size"]
    channels = config["in_channels"]
    labels = TensorSpec(name="class_labels", dtype="int64", dims=("trunk_rows",), below=classes + 1)
    return Shape(
        num_blocks=config["num_layers"],
        heads=config["num_attention_heads"],
        head_dim=config["attention_head_dim"],
        latents=(channels, side * config["patch_size"], side * config["patch_size"]),
        out_channels=config.get("out_channels") or channels,
        grid=(side, side),
        keys=side**2,
        conditioning=(labels,),
        prediction="epsilon",
        native_side=config["sample_size"],
    )


def _text(config_of: Callable[[str], Config], defaults: SamplingDefaults) -> TextRange:
    return TextRange(least=0, usual=0, most=0)


def _labels(index: Mapping[str, Any], config: Config) -> ClassLabels:
    """Names are the pipeline's ``id2label``, which ``DiTPipeline`` keeps in its index.

    Raises:
        ModelError: If they are no names of this transformer's classes.
    """
    count, given = config["num_embeds_ada_norm"], index.get("id2label") or {}
    if not given:
        return ClassLabels(count=count)
    try:
        names = {int(number): str(name) for number, name in given.items()}
    except (AttributeError, ValueError) as error:
        raise ModelError("id2label in model_index.json does not map numbers to names; mend it") from error
    if beyond := sorted(number for number in names if not 0 <= number < count):
        raise ModelError(
            f"id2label in model_index.json names a class {beyond[0]}, the transformer has 0 to {count - 1}; "
            "mend it, or give the transformer that it belongs to"
        )
    return ClassLabels(count=count, names=tuple(names.get(number, "") for number in range(count)))


def _attentions(config: Config) -> int:
    return int(config["num_layers"])


DIT = Family(
    name="dit",
    title="DiT",
    pipelines=("DiTPipeline",),
    transformer="DiTTransformer2DModel",
    legacy_transformers=(_LEGACY,),
    components=(KL_DECODER,),
    decoder=KL_DECODER.name,
    encoder=KL_ENCODER,
    shape=_shape,
    latents=kl_latents,
    text=_text,
    labels=_labels,
    attentions=_attentions,
    settings=("timestep_shift",),
    models=MODELS,
    negatives=PUBLISHED,
    defaults=defaults_of,
    configs=CONFIGS,
    classes=CLASSES,
    parameters=PARAMETERS,
)
