"""Text encoders of SD3, as facts: two CLIPs and a T5. Nothing here needs torch; their modules do."""

from typing import Any

from emag_export.contract import GraphSpec, TensorSpec
from emag_export.families.family import Component, Config

__all__ = ["CLIP_G", "CLIP_L", "T5"]


def _clip_spec(name: str, config: Config, dtype: str) -> GraphSpec:
    width, tokens = config["hidden_size"], config["max_position_embeddings"]
    return GraphSpec(
        name=name,
        inputs=(TensorSpec(name="input_ids", dtype="int64", dims=("rows", tokens)),),
        outputs=(
            TensorSpec(name="text_embeds", dtype=dtype, dims=("rows", config["projection_dim"])),
            TensorSpec(name="penultimate_hidden_state", dtype=dtype, dims=("rows", tokens, width)),
        ),
    )


def _t5_spec(name: str, config: Config, dtype: str) -> GraphSpec:
    hidden = ("rows", "tokens", config["d_model"])
    return GraphSpec(
        name=name,
        inputs=(TensorSpec(name="input_ids", dtype="int64", dims=("rows", "tokens")),),
        outputs=(TensorSpec(name="last_hidden_state", dtype=dtype, dims=hidden),),
    )


def _clip(name: str, tokenizer: str) -> Component:
    return Component(
        name=name,
        folder=name,
        library="transformers",
        model_class="CLIPTextModelWithProjection",
        wrapper="emag_export.families.sd3.encoders:ClipEncoder",
        spec=_clip_spec,
        example={"rows": 2},
        check=({"rows": 1}, {"rows": 5}),
        tokenizer=tokenizer,
        label="CLIP",
        note="attention scores, softmax and layer norms: sums over many terms lose digits in float16",
    )


CLIP_L = _clip("text_encoder", "tokenizer")
CLIP_G = _clip("text_encoder_2", "tokenizer_2")

_T5: dict[str, Any] = {"name": "text_encoder_3", "folder": "text_encoder_3", "tokenizer": "tokenizer_3"}

T5 = Component(
    **_T5,
    library="transformers",
    model_class="T5EncoderModel",
    wrapper="emag_export.families.sd3.encoders:T5Encoder",
    spec=_t5_spec,
    example={"rows": 2, "tokens": 9},
    check=({"rows": 1, "tokens": 20}, {"rows": 3, "tokens": 7}),
    label="T5",
    optional="t5",
    note="the feed-forward's second projection (wo), the residual stream from the first one on, norms, "
    "attention "
    "scores and softmax: activations of T5 exceed 65504",
    half_size=1.2,
)
"""May be left out; zeros then stand in its place, as in diffusers."""
