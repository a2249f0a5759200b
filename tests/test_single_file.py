"""Checkpoints in one file, in the published layout: the weights that diffusers would load from its own."""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from emag_export.errors import ModelError
from emag_export.exporter.source.find import find_source
from emag_export.exporter.source.load import load_component, load_transformer
from emag_export.families import FAMILIES
from emag_export.families.sd3 import single_file
from emag_export.families.source_model import SourceModel
from emag_export.tiny_sd3 import MODEL_DIR

# The published names of the tensors that are only renamed, by diffusers' name.
_TOP = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}
_BLOCK = {
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
_QKV = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
}


def swapped(tensor: Tensor) -> Tensor:
    """Scale and shift of an adaptive norm stand the other way round in the two layouts."""
    return torch.cat(tensor.chunk(2)[::-1])


def published_transformer(weights: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """diffusers' names and shapes to the published ones."""
    result = {}
    for old, new in _TOP.items():
        for kind in ("", ".weight", ".bias"):
            if old + kind in weights:
                tensor = weights[old + kind]
                result[new + kind] = swapped(tensor) if old == "norm_out.linear" else tensor
    for i in range(layers):
        here, there = f"transformer_blocks.{i}.", f"joint_blocks.{i}."
        for kind in (".weight", ".bias"):
            for old, new in _BLOCK.items():
                if here + old + kind in weights:
                    tensor = weights[here + old + kind]
                    last = i == layers - 1 and old == "norm1_context.linear"
                    result[there + new + kind] = swapped(tensor) if last else tensor
            for new, parts in _QKV.items():
                if here + parts[0] + kind in weights:
                    result[there + new + kind] = torch.cat([weights[here + part + kind] for part in parts])
    assert sum(t.numel() for t in result.values()) == sum(t.numel() for t in weights.values())
    return {f"model.diffusion_model.{name}": tensor for name, tensor in result.items()}


def published_vae(weights: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    def name_of(name: str) -> str:
        name = re.sub(r"down_blocks\.(\d+)", r"down.\1", name)
        name = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{levels - 1 - int(match[1])}", name)
        name = re.sub(r"mid_block\.resnets\.(\d+)", lambda match: f"mid.block_{int(match[1]) + 1}", name)
        name = name.replace("resnets", "block").replace("conv_shortcut", "nin_shortcut")
        name = name.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")
        return "first_stage_model." + name.replace("conv_norm_out", "norm_out")

    return {name_of(name): tensor for name, tensor in weights.items()}


def small_transformer(*, qk_norm: str | None, dual: tuple[int, ...]) -> Any:
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=128,
        patch_size=2,
        in_channels=8,
        out_channels=8,
        num_layers=3,
        attention_head_dim=32 if qk_norm else 64,
        num_attention_heads=2,
        joint_attention_dim=48,
        caption_projection_dim=64 if qk_norm else 128,
        pooled_projection_dim=24,
        pos_embed_max_size=12,
        qk_norm=qk_norm,
        dual_attention_layers=dual,
    )


@pytest.fixture
def tiny_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """tiny-sd3 in one file, with tokenizers beside it; its sizes stand for the published ones."""
    tiny = find_source("tiny-sd3")
    configs = {
        name: tiny.config(name)
        for name in ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
    }
    configs["scheduler"] = json.loads((MODEL_DIR / "scheduler" / "scheduler_config.json").read_text())
    monkeypatch.setattr(single_file, "CONFIGS", {"sd3": configs})
    monkeypatch.setattr(single_file, "_HEAD_DIM", configs["transformer"]["attention_head_dim"])
    weights = published_transformer(load_transformer(tiny).state_dict(), configs["transformer"]["num_layers"])
    vae = load(tiny, "vae_decoder").state_dict()
    weights |= published_vae(vae, len(configs["vae"]["block_out_channels"]))
    for name, prefix in (
        ("text_encoder", "clip_l"),
        ("text_encoder_2", "clip_g"),
        ("text_encoder_3", "t5xxl"),
    ):
        state = load(tiny, name).state_dict()
        state.pop("encoder.embed_tokens.weight", None)
        weights |= {f"text_encoders.{prefix}.transformer.{key}": tensor for key, tensor in state.items()}
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, tmp_path / "sd3.safetensors")
    for folder in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        shutil.copytree(MODEL_DIR / folder, tmp_path / folder)
    return tmp_path / "sd3.safetensors"


def load(source: SourceModel, component: str, precision: str = "float32") -> Any:
    return load_component(source, source.family.component(component), precision)


@pytest.mark.parametrize(("qk_norm", "dual"), [(None, ()), ("rms_norm", (0, 1))])
def test_transformer_is_found_and_loaded(qk_norm: str | None, dual: tuple[int, ...], tmp_path: Path) -> None:
    """As SD3 and as SD3.5-medium: configuration from the shapes alone, and every weight where it belongs."""
    wanted = small_transformer(qk_norm=qk_norm, dual=dual).eval()
    path = tmp_path / "sd3.safetensors"
    save_file(published_transformer(wanted.state_dict(), 3), path)
    source = find_source(str(path))
    config = source.config("transformer")
    assert {name: wanted.config[name] for name in config if name[0] != "_"} == {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in config.items()
        if name[0] != "_"
    }
    got = load_transformer(source)
    assert got.state_dict().keys() == wanted.state_dict().keys()
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(got.state_dict()[name], tensor), name
    assert load_transformer(source, "float16").dtype is torch.float16
    assert not source.has("vae")
    assert not source.has("text_encoder")
    assert not source.has("tokenizer")
    assert source.fingerprint() == hashlib.sha256(path.read_bytes()).hexdigest()
    assert source.weight_bytes("transformer") == 4 * sum(t.numel() for t in wanted.state_dict().values())
    assert dict(source.copied("scheduler")).keys() == {"scheduler_config.json"}


@pytest.mark.parametrize("component", [part.name for part in FAMILIES["sd3"].components])
def test_other_parts_of_the_file(component: str, tiny_published: Path) -> None:
    source, tiny = find_source(str(tiny_published)), find_source("tiny-sd3")
    got, wanted = load(source, component).state_dict(), load(tiny, component).state_dict()
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        if component == "text_encoder" and name == "text_projection.weight":
            # SD3 takes CLIP-L's pooled state without its projection: diffusers puts the identity there.
            assert torch.equal(got[name], torch.eye(len(tensor)))
        else:
            assert torch.equal(got[name], tensor), name


def test_encoders_count_where_their_tokenizers_are(tiny_published: Path) -> None:
    source = find_source(str(tiny_published))
    assert all(source.has(name) for name in ("text_encoder_3", "tokenizer_3", "vae", "scheduler"))
    assert (
        dict(source.copied("tokenizer_3"))["tokenizer.json"]
        == (MODEL_DIR / "tokenizer_3" / "tokenizer.json").read_bytes()
    )
    before = source.fingerprint()
    shutil.rmtree(tiny_published.parent / "tokenizer_3")
    without = find_source(str(tiny_published))
    assert not without.has("text_encoder_3")
    assert not without.has("tokenizer_3")
    assert without.has("text_encoder_2")
    assert without.fingerprint() != before


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["model.diffusion_model.double_blocks.0.img_attn.qkv.weight"], r"but model\.diffusion_model;"),
        (["transformer_blocks.0.attn.to_q.weight"], r"but transformer_blocks\.0; give an SD3"),
        (["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"], "incomplete SD3 checkpoint"),
    ],
)
def test_other_files_are_refused(names: list[str], message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({name: torch.zeros(2) for name in names}, path)
    with pytest.raises(ModelError, match=message):
        find_source(str(path))


def test_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(ModelError, match=r"cannot be read.*download it again"):
        find_source(str(path))


def test_missing_tensor_is_refused(tmp_path: Path) -> None:
    weights = published_transformer(small_transformer(qk_norm=None, dual=()).state_dict(), 3)
    del weights["model.diffusion_model.final_layer.linear.bias"]
    save_file(weights, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=r"cannot be loaded.*final_layer\.linear\.bias"):
        load_transformer(find_source(str(tmp_path / "x.safetensors")))
