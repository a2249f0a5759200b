"""Random weights on published configurations: right sizes, reproducible, finite in half precision."""

from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from emag_export.errors import BundleError
from emag_export.exporter.build import build
from emag_export.exporter.describe.identify import identify
from emag_export.exporter.eager import open_eager, source_of
from emag_export.exporter.graph.examples import random_inputs
from emag_export.exporter.source.random_weights import random_component
from emag_export.families import FAMILIES, KNOWN_MODELS
from emag_export.options import BuildOptions

SD3 = FAMILIES["sd3"]
CONFIGS, PARAMETERS = SD3.configs, SD3.parameters
CLASSES = {
    "transformer": SD3Transformer2DModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModelWithProjection,
    "text_encoder_2": CLIPTextModelWithProjection,
    "text_encoder_3": T5EncoderModel,
}

SMALL = {
    "transformer": {
        **CONFIGS["sd3.5-medium"]["transformer"],
        "num_layers": 3,
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "caption_projection_dim": 64,
        "joint_attention_dim": 64,
        "pooled_projection_dim": 64,
        "pos_embed_max_size": 16,
        "dual_attention_layers": [0],
    },
    "vae": {**CONFIGS["sd3"]["vae"], "block_out_channels": [32] * 4, "layers_per_block": 1},
    "text_encoder": {
        **CONFIGS["sd3"]["text_encoder"],
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": 32,
        "vocab_size": 1000,
    },
    "text_encoder_3": {
        **CONFIGS["sd3"]["text_encoder_3"],
        "d_model": 64,
        "d_ff": 128,
        "d_kv": 32,
        "num_heads": 2,
        "num_layers": 2,
        "vocab_size": 1000,
    },
}
SMALL["text_encoder_2"] = SMALL["text_encoder"]
SMALL["scheduler"] = dict(CONFIGS["sd3"]["scheduler"])


@pytest.fixture
def small_sd3(monkeypatch: pytest.MonkeyPatch) -> None:
    """``sd3`` with the small configurations."""
    table = MappingProxyType({**CONFIGS, "sd3": SMALL})
    changed = MappingProxyType({"sd3": replace(SD3, configs=table)})
    monkeypatch.setattr("emag_export.exporter.source.random_model.RANDOM_MODELS", changed)


@pytest.mark.parametrize(
    "part", [f"{model}/transformer" for model in CONFIGS] + [f"sd3/{n}" for n in CLASSES]
)
def test_configurations_have_the_published_number_of_parameters(part: str) -> None:
    """Hub pages: SD3-medium 2.0 B, SD3.5-medium 2.2 B (2.5 B stored), SD3.5-large 8.1 B, T5-XXL 4.8 B."""
    model, name = part.split("/")
    with torch.device("meta"):
        made = random_component(CLASSES[name], CONFIGS[model][name], dtype=torch.float16, seed=0)
    count = sum(tensor.numel() for tensor in made.state_dict().values())
    if (
        name == "text_encoder_3"
    ):  # the embedding is listed twice, under the name of its module and of its table
        count -= made.get_input_embeddings().weight.numel()  # type: ignore[operator]
    assert count == PARAMETERS[model if name == "transformer" else name]


def test_every_configuration_is_of_a_known_model_with_as_many_blocks() -> None:
    assert set(CONFIGS) - set(KNOWN_MODELS) == {"sd3-narrow"}  # for measurements; nobody published it
    for name in set(CONFIGS) & set(KNOWN_MODELS):
        assert KNOWN_MODELS[name].blocks == CONFIGS[name]["transformer"]["num_layers"]


@pytest.mark.parametrize("name", list(CLASSES))
def test_same_seed_same_weights_and_no_effect_on_the_callers_generator(name: str) -> None:
    before = torch.random.get_rng_state()
    first, again, other = (
        random_component(CLASSES[name], SMALL[name], dtype=torch.float16, seed=seed).state_dict()
        for seed in (1, 1, 2)
    )
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.get_default_dtype() is torch.float32
    dtypes = {key: tensor.dtype for key, tensor in first.items() if tensor.is_floating_point()}
    for key, dtype in dtypes.items():  # T5's wo stays in float32, as transformers keeps it for a checkpoint
        assert dtype is (torch.float32 if ".wo." in key else torch.float16), key
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.rehearsal
@pytest.mark.usefixtures("small_sd3")
def test_a_bundle_of_the_transformer_alone(tmp_path: Path) -> None:
    options = BuildOptions(
        emag_candidates=(1,), precision="float16", weights_seed=3, components=("transformer",)
    )
    bundle = build("sd3", tmp_path / "b", options)
    assert bundle.components == ["transformer"]
    assert (bundle.geometry.pixels_per_latent, bundle.geometry.text.least) == (8, 77)
    assert bundle.provenance.seed == 3
    assert bundle.model_index["text_encoder_3"] == [None, None]
    assert bundle.config("scheduler", "scheduler_config.json")["shift"] == 3.0
    with pytest.raises(BundleError, match="`components` left it out"):
        bundle.graph("vae_decoder")
    assert not list(bundle.path.glob("tokenizer*"))
    bundle.check()

    spec = bundle.spec("transformer")
    sizes = {"trunk_rows": 2, "rows": 3, "tracked": 1, "text": 9, "h": 4, "w": 6}
    with open_eager(source_of(bundle))(bundle, "transformer") as engine:
        outputs = engine.run(random_inputs(spec, sizes))
    # Finite, and of the order of what a trained model predicts: velocities of standard deviation about one.
    assert 0.01 < float(outputs["noise_pred"].float().std()) < 100
    assert float(outputs["layer_delta"].min()) > 0

    phases: list[str] = []
    build("sd3", tmp_path / "b", options, progress=lambda event: phases.append(event.phase))
    assert phases == ["hash", "reuse"]


@pytest.mark.usefixtures("small_sd3")
def test_all_components_and_without_t5(tmp_path: Path) -> None:
    plan = identify("sd3", BuildOptions(emag_candidates=(1,), weights_seed=0, without=("text_encoder_3",)))
    assert plan.components == ("transformer", "text_encoder", "text_encoder_2", "vae_decoder")
    bundle = build(
        "sd3", tmp_path / "b", BuildOptions(emag_candidates=(1,), weights_seed=0, without=("text_encoder_3",))
    )
    assert bundle.model_index["tokenizer_3"] == [None, None]
    assert sorted(path.name for path in bundle.path.glob("tokenizer*")) == ["tokenizer", "tokenizer_2"]


def test_the_seed_is_part_of_the_key() -> None:
    plans = [identify("sd3.5-large", BuildOptions(weights_seed=seed)) for seed in (0, 0, 1)]
    assert plans[0].key == plans[1].key != plans[2].key
    # 16.3 GB of transformer, 1.6 of CLIP, 9.5 of T5, 0.2 of autoencoder
    assert plans[0].source.weight_bytes() == pytest.approx(27.6e9, rel=0.01)
    assert plans[0].source.weight_bytes("transformer") == 2 * PARAMETERS["sd3.5-large"]
