"""The text encoder of Z-Image, as facts: a Qwen3. Nothing here needs torch; its module does."""

from emag_export.contract import GraphSpec, TensorSpec
from emag_export.families.family import Component, Config

__all__ = ["QWEN3"]


def _spec(name: str, config: Config, dtype: str) -> GraphSpec:
    hidden = ("rows", "tokens", config["hidden_size"])
    return GraphSpec(
        name=name,
        inputs=(TensorSpec(name="input_ids", dtype="int64", dims=("rows", "tokens")),),
        outputs=(TensorSpec(name="penultimate_hidden_state", dtype=dtype, dims=hidden),),
    )


QWEN3 = Component(
    name="text_encoder",
    folder="text_encoder",
    library="transformers",
    model_class="Qwen3Model",
    wrapper="emag_export.families.z_image.encoder:Qwen3Encoder",
    spec=_spec,
    example={"rows": 2, "tokens": 9},
    check=({"rows": 1, "tokens": 20}, {"rows": 3, "tokens": 7}),
    tokenizer="tokenizer",
    label="Qwen3",
    note="attention scores and softmax: sums over many terms lose digits in float16",
)
