"""Weights that are read one at a time are those that the library loads, or that a fresh model has."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file, save_file
from torch import nn

from emag_export.bundle import DENOISER
from emag_export.exporter.source.find import find_source
from emag_export.exporter.source.load import (
    load_component,
    load_transformer,
    open_component,
    open_transformer,
)
from emag_export.exporter.source.place import READ_AT_ONCE
from emag_export.exporter.source.random_weights import random_component, unread_random
from emag_export.families import FAMILIES
from emag_export.families.protocol import numbers
from emag_export.families.source_model import SourceModel
from emag_export.families.unread import unread_files
from emag_export.options import Lora
from tests.dit import save_dit_pipeline, small_dit
from tests.test_random_model import CLASSES, SMALL
from tests.thinned import mostly_slow
from tests.unread import CONFIG, PRECISIONS, lora


def pairs(source: SourceModel, folder: str, precision: str, loras: tuple[Lora, ...]) -> tuple[Any, Any, Any]:
    """The model with unread weights, their place, and the model as its library loads it."""
    if folder == DENOISER:
        opened = open_transformer(source, precision, loras)
        assert opened is not None
        return *opened, load_transformer(source, precision, loras)
    part = next(part for part in source.family.components if part.folder == folder)
    found = open_component(source, part, precision)
    assert found is not None
    # As :func:`wrapped` makes it, but the wrapper converts what it holds: the model itself is the oracle.
    return found[0].model, found[1], load_component(source, part, precision)


@pytest.mark.parametrize("precision", mostly_slow(PRECISIONS, "float32"))
@pytest.mark.parametrize("name", ["tiny-sd3", "sharded", "half_files"])
def test_every_weight_is_what_the_library_loads(
    name: str, precision: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Oracle: ``from_pretrained`` of diffusers and transformers, LoRAs merged into it.

    Among the weights: T5's embedding, which is tied, and its ``wo``, which stays in float32 beside float16.
    """
    source = find_source(name if name == "tiny-sd3" else str(request.getfixturevalue(name)))
    width = source.config(DENOISER)["num_attention_heads"] * source.config(DENOISER)["attention_head_dim"]
    merged = (lora(tmp_path / "lora.safetensors", "transformer_blocks.0.attn.to_q", width),)
    for folder in (folder for folder in source.family.folders.values() if source.has(folder)):
        got, reserved, wanted = pairs(source, folder, precision, merged)
        weights, oracle = got.state_dict(keep_vars=True), wanted.state_dict()
        if folder != "vae":  # its wrapper puts float16 norms into modules of another name
            assert list(weights) == list(oracle)
        large = [n for n, weight in oracle.items() if weight.numel() > READ_AT_ONCE and weight.ndim > 1]
        assert large, "a test of unread weights needs some"
        for key, weight in weights.items():
            if key not in oracle:
                continue
            unread = isinstance(weight, nn.Parameter) and key in large  # buffers are computed
            assert hasattr(weight, "read_stored") == unread, key
            assert numbers(weight).dtype == weight.dtype == oracle[key].dtype, key
            assert torch.equal(numbers(weight), oracle[key]), key
        reserved.check()


def clip() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"vocab_size": 200, "bos_token_id": 1, "eos_token_id": 2}
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes, **tokens))


def qwen() -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    heads = {"num_key_value_heads": 1, "head_dim": 32, "vocab_size": 200}
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes, **heads))


@pytest.mark.parametrize(
    ("kind", "make", "prefix"),
    [("CLIPTextModel", clip, "text_model."), ("CLIPTextModel", clip, ""), ("Qwen3Model", qwen, "")],
    ids=["older names", "own names", "part of a model"],
)
def test_names_that_transformers_renames_are_found(
    kind: str, make: Callable[[], Any], prefix: str, tmp_path: Path
) -> None:
    model, cls = make(), getattr(transformers, kind)
    model.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    save_file({f"{prefix}{k}": v for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    wanted = cls.from_pretrained(tmp_path, dtype=torch.float16).state_dict()
    config = json.loads((tmp_path / "config.json").read_text())
    unread = unread_files([file], cls, config, torch.float16)
    assert unread is not None
    assert list(unread.model.state_dict()) == list(wanted)
    for key, tensor in wanted.items():
        assert torch.equal(unread.read(key).to(torch.float16), tensor), key


def test_a_layout_that_must_be_converted_is_loaded_by_its_library(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = SD3Transformer2DModel.from_config(CONFIG)
    weights = {name: tensor for name, tensor in model.state_dict().items() if "norm_out" not in name}
    save_file(weights, tmp_path / "x.safetensors")
    assert unread_files([tmp_path / "x.safetensors"], type(model), CONFIG, torch.float16) is None
    shapes = {name: tensor[..., :1].contiguous() for name, tensor in model.state_dict().items()}
    save_file(shapes, tmp_path / "y.safetensors")
    assert unread_files([tmp_path / "y.safetensors"], type(model), CONFIG, torch.float16) is None


def test_tied_weights_are_read_and_stored_once(half_files: Path) -> None:
    model, _, _ = pairs(find_source(str(half_files)), "text_encoder_3", "float16", ())
    weights = model.state_dict(keep_vars=True)
    tied = [key for key in weights if key.endswith(("shared.weight", "embed_tokens.weight"))]
    assert len(tied) == 2
    assert len({weights[key].data_ptr() for key in tied}) == 1


@pytest.mark.parametrize("name", list(CLASSES))
def test_random_weights_do_not_depend_on_how_many_are_read(name: str) -> None:
    whole = random_component(CLASSES[name], SMALL[name], dtype=torch.float32, seed=5).state_dict()
    unread = unread_random(CLASSES[name], SMALL[name], dtype=torch.float32, seed=5)
    for key in reversed(list(whole)):
        assert torch.equal(unread.read(key), whole[key]), key


@pytest.mark.parametrize("name", list(CLASSES))
def test_random_weights_are_those_of_a_fresh_model(name: str) -> None:
    """Oracle: the library's own constructor. Other numbers, the same distributions."""
    got = random_component(CLASSES[name], SMALL[name], dtype=torch.float32, seed=0).state_dict()
    kind, config = CLASSES[name], dict(SMALL[name])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = kind.from_config(config) if hasattr(kind, "from_config") else kind(kind.config_class(**config))
    for key, wanted in made.state_dict().items():
        if wanted.numel() < 2 or float(wanted.std()) == 0 or not wanted.is_floating_point():
            assert torch.equal(got[key], wanted), key
        elif wanted.numel() >= 1000:  # standard error of a deviation: 2.2 % at 1000 numbers; 6 % was measured
            assert 0.9 < float(got[key].std() / wanted.std()) < 1.1, key


@pytest.mark.parametrize("tied", [True, False])
def test_equal_embeddings_of_a_dit_are_found_without_loading_the_model(
    tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DiT compares what its blocks hold; weights that are not read yet must not look equal."""
    save_dit_pipeline(tmp_path / "dit")
    model = small_dit(tied=tied, attention_head_dim=64)  # embeddings of 256 x 128: unread
    model.save_pretrained(tmp_path / "dit" / "transformer")
    opened = open_transformer(find_source(str(tmp_path / "dit")))
    assert opened is not None
    blocks = FAMILIES["dit"].part("graph").blocks(opened[0])
    assert blocks._embedding == ((0, 0, 0, 0) if tied else (0, 1, 2, 3))
    opened[1].check()
