"""Text encoders and VAE decoder as modules with named inputs and outputs, one at a time in memory."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from emag_export.contract import GraphSpec, TensorSpec
from emag_export.errors import ModelError
from emag_export.exporter.graph.half import (
    keep_attention_in_float32,
    keep_norms_in_float32,
    weights_precision,
)
from emag_export.exporter.source.find import SourceModel
from emag_export.exporter.source.lora import Lora, merge_loras
from emag_export.packages import require_packages
from emag_export.shapes import Sizes

__all__ = ["AUXILIARY", "Auxiliary", "load_transformer", "load_weights"]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class _ClipEncoder(nn.Module):
    """CLIP text model; SD3 uses the second to last hidden states and the projected pooled state."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = keep_attention_in_float32(model)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        output = self.model(input_ids=input_ids, output_hidden_states=True)
        return output.text_embeds, output.hidden_states[-2]


class _T5Encoder(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = keep_attention_in_float32(model)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden: Tensor = self.model(input_ids=input_ids).last_hidden_state
        return hidden


class _VaeDecoder(nn.Module):
    """Decoder of the autoencoder; its inputs and outputs are cast where it is kept in float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = keep_norms_in_float32(model)

    def forward(self, latent_sample: Tensor) -> Tensor:
        latents = latent_sample.to(self.model.dtype)
        sample: Tensor = self.model.decode(latents, return_dict=False)[0]
        return sample.to(latent_sample.dtype)


@dataclass(frozen=True, kw_only=True)
class Auxiliary:
    """How one component besides the denoiser is loaded, described and traced."""

    source: str
    """Folder in the source pipeline."""
    library: str
    model_class: str
    wrap: Callable[[nn.Module], nn.Module]
    spec: Callable[[str, Mapping[str, Any], str], GraphSpec]
    """(component, model configuration, precision) to its graph."""
    example: Sizes
    check: tuple[Sizes, ...]


def _clip_spec(name: str, config: Mapping[str, Any], dtype: str) -> GraphSpec:
    width, tokens = config["hidden_size"], config["max_position_embeddings"]
    return GraphSpec(
        name=name,
        inputs=(TensorSpec(name="input_ids", dtype="int64", dims=("rows", tokens)),),
        outputs=(
            TensorSpec(name="text_embeds", dtype=dtype, dims=("rows", config["projection_dim"])),
            TensorSpec(name="penultimate_hidden_state", dtype=dtype, dims=("rows", tokens, width)),
        ),
    )


def _t5_spec(name: str, config: Mapping[str, Any], dtype: str) -> GraphSpec:
    return GraphSpec(
        name=name,
        inputs=(TensorSpec(name="input_ids", dtype="int64", dims=("rows", "tokens")),),
        outputs=(
            TensorSpec(name="last_hidden_state", dtype=dtype, dims=("rows", "tokens", config["d_model"])),
        ),
    )


def _vae_spec(name: str, config: Mapping[str, Any], dtype: str) -> GraphSpec:
    factor = 2 ** (len(config["block_out_channels"]) - 1)
    return GraphSpec(
        name=name,
        inputs=(
            TensorSpec(name="latent_sample", dtype=dtype, dims=("rows", config["latent_channels"], "h", "w")),
        ),
        outputs=(
            TensorSpec(
                name="sample",
                dtype=dtype,
                dims=("rows", config["out_channels"], f"{factor}*h", f"{factor}*w"),
            ),
        ),
    )


_CLIP: dict[str, Any] = {
    "library": "transformers",
    "model_class": "CLIPTextModelWithProjection",
    "wrap": _ClipEncoder,
    "spec": _clip_spec,
    "example": {"rows": 2},
    "check": ({"rows": 1}, {"rows": 5}),
}

AUXILIARY: Mapping[str, Auxiliary] = MappingProxyType(
    {
        "text_encoder": Auxiliary(source="text_encoder", **_CLIP),
        "text_encoder_2": Auxiliary(source="text_encoder_2", **_CLIP),
        "text_encoder_3": Auxiliary(
            source="text_encoder_3",
            library="transformers",
            model_class="T5EncoderModel",
            wrap=_T5Encoder,
            spec=_t5_spec,
            example={"rows": 2, "tokens": 9},
            check=({"rows": 1, "tokens": 20}, {"rows": 3, "tokens": 7}),
        ),
        "vae_decoder": Auxiliary(
            source="vae",
            library="diffusers",
            model_class="AutoencoderKL",
            wrap=_VaeDecoder,
            spec=_vae_spec,
            example={"rows": 2, "h": 6, "w": 4},
            check=({"rows": 1, "h": 5, "w": 9}, {"rows": 3, "h": 8, "w": 6}),
        ),
    }
)
"""Components besides the denoiser, by folder name in the bundle."""


def load_weights(
    source: SourceModel, folder: str, library: str, model_class: str, precision: str
) -> nn.Module:
    """Load one component, in eval mode, from safetensors only.

    Args:
        source: Where from.
        folder: Of the component in the source.
        library: ``diffusers`` or ``transformers``.
        model_class: Class in that library; no other is taken.
        precision: Of the weights, but for what :mod:`emag_export.exporter.graph.half` keeps in float32.

    Raises:
        ModelError: If its class is another than expected or its files cannot be read.
        MissingDependencyError: Without accelerate: diffusers would ignore the precision of some weights.
    """
    require_packages("accelerate", purpose="loading a model's weights")
    module = __import__(library)
    declared = source.index[folder]
    if declared[1] != model_class:
        raise ModelError(f"{folder} of {source.path} is a {declared[1]}; only {model_class} can be exported")
    dtype = DTYPES[weights_precision(source.config(folder), model_class, precision)]
    dtype_option = {"torch_dtype" if library == "diffusers" else "dtype": dtype}
    try:
        model = source.load(folder, getattr(module, model_class), **dtype_option)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{source.path / folder} cannot be loaded: {error}") from error
    loaded: nn.Module = model.eval().requires_grad_(False)
    return loaded


def load_transformer(source: SourceModel, precision: str = "float32", loras: Sequence[Lora] = ()) -> Any:
    """The diffusers ``SD3Transformer2DModel`` of the source, with these LoRAs merged.

    Raises:
        ModelError: If it cannot be loaded, or a LoRA does not fit.
    """
    model = load_weights(source, "transformer", "diffusers", "SD3Transformer2DModel", precision)
    merge_loras(model, loras)
    return model
