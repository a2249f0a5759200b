"""Text encoders that several families share, as facts: CLIP and T5. Nothing here needs torch.

Configurations are those of the published models, for random weights: the numbers of their ``config.json``
files that decide a graph. See also arXiv:2103.00020 (CLIP) and arXiv:1910.10683 (T5).
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from emag_export.contract import GraphSpec, TensorSpec
from emag_export.families.family import Component, Config

__all__ = ["CLIP_L", "CLIP_L_PARAMETERS", "T5_XXL", "T5_XXL_PARAMETERS", "clip", "clip_config", "t5"]

_CLIP_NOTE = "attention scores, softmax and layer norms: sums over many terms lose digits in float16"
_GRAPHS = "emag_export.families.text_encoders_graph"


def _tokens_in(*dims: int | str) -> tuple[TensorSpec, ...]:
    return (TensorSpec(name="input_ids", dtype="int64", dims=("rows", *dims)),)


def _projected_spec(name: str, config: Config, dtype: str) -> GraphSpec:
    width, tokens = config["hidden_size"], config["max_position_embeddings"]
    return GraphSpec(
        name=name,
        inputs=_tokens_in(tokens),
        outputs=(
            TensorSpec(name="text_embeds", dtype=dtype, dims=("rows", config["projection_dim"])),
            TensorSpec(name="penultimate_hidden_state", dtype=dtype, dims=("rows", tokens, width)),
        ),
    )


def _pooled_spec(name: str, config: Config, dtype: str) -> GraphSpec:
    return GraphSpec(
        name=name,
        inputs=_tokens_in(config["max_position_embeddings"]),
        outputs=(TensorSpec(name="pooler_output", dtype=dtype, dims=("rows", config["hidden_size"])),),
    )


def _t5_spec(name: str, config: Config, dtype: str) -> GraphSpec:
    hidden = ("rows", "tokens", config["d_model"])
    return GraphSpec(
        name=name,
        inputs=_tokens_in("tokens"),
        outputs=(TensorSpec(name="last_hidden_state", dtype=dtype, dims=hidden),),
    )


def clip(name: str, tokenizer: str, *, projected: bool = True) -> Component:
    """A CLIP text model.

    Args:
        name: Its folder, in the source and in a bundle.
        tokenizer: Folder of what feeds it.
        projected: Gives its projected pooled state and its second to last hidden states; otherwise the pooled
            state alone, as it is.
    """
    return Component(
        name=name,
        folder=name,
        library="transformers",
        model_class="CLIPTextModelWithProjection" if projected else "CLIPTextModel",
        wrapper=f"{_GRAPHS}:{'ClipEncoder' if projected else 'ClipPooler'}",
        spec=_projected_spec if projected else _pooled_spec,
        example={"rows": 2},
        check=({"rows": 1}, {"rows": 5}),
        tokenizer=tokenizer,
        label="CLIP",
        note=_CLIP_NOTE,
    )


def t5(name: str, tokenizer: str, *, optional: str | None = None) -> Component:
    """The encoder half of a T5.

    Args:
        name: Its folder, in the source and in a bundle.
        tokenizer: Folder of what feeds it.
        optional: Name of the switch that leaves it out; None where pictures need it.
    """
    return Component(
        name=name,
        folder=name,
        library="transformers",
        model_class="T5EncoderModel",
        wrapper=f"{_GRAPHS}:T5Encoder",
        spec=_t5_spec,
        example={"rows": 2, "tokens": 9},
        check=({"rows": 1, "tokens": 20}, {"rows": 3, "tokens": 7}),
        tokenizer=tokenizer,
        label="T5",
        optional=optional,
        note="the feed-forward's second projection (wo), the residual stream from the first one on, norms, "
        "attention "
        "scores and softmax: activations of T5 exceed 65504",
        half_size=1.2,
    )


def clip_config(**sizes: Any) -> Config:
    """Configuration of a CLIP text model of these sizes."""
    common = {
        "architectures": ["CLIPTextModelWithProjection"],
        "model_type": "clip_text_model",
        "vocab_size": 49408,
        "max_position_embeddings": 77,
        "layer_norm_eps": 1e-5,
        # The historical id: with it, transformers pools at the largest token, which is the end token.
        "eos_token_id": 2,
        "bos_token_id": 0,
        "pad_token_id": 1,
    }
    return MappingProxyType({**common, **sizes})


CLIP_L = clip_config(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    projection_dim=768,
    hidden_act="quick_gelu",
)
CLIP_L_PARAMETERS: Mapping[str, int] = MappingProxyType({"projected": 123_650_304, "pooled": 123_060_480})
"""Numbers, with and without the projection."""

T5_XXL: Config = MappingProxyType(
    {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "d_model": 4096,
        "d_ff": 10240,
        "d_kv": 64,
        "num_heads": 64,
        "num_layers": 24,
        "vocab_size": 32128,
        "feed_forward_proj": "gated-gelu",
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
        "is_encoder_decoder": False,
        "use_cache": False,
        "tie_word_embeddings": False,
    }
)
T5_XXL_PARAMETERS = 4_762_310_656
