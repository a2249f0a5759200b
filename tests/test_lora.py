"""LoRAs merged into the transformer, against PEFT and against the closed form."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file
from torch import Tensor

from emag_export.bench.session import Setup
from emag_export.bundle import MANIFEST, Bundle
from emag_export.cli.build import parse_lora
from emag_export.cli.main import main
from emag_export.errors import InputError, ModelError
from emag_export.evaluation.asked import Evaluation, check_evaluation
from emag_export.evaluation.metrics.names import MetricModels
from emag_export.exporter.source.find import find_source
from emag_export.exporter.source.load import load_transformer
from emag_export.exporter.source.lora import lora_records, merge_loras, recorded_loras
from emag_export.manifest import LoraRecord
from emag_export.options import Lora
from emag_export.runtime.pictures.metadata import read_picture_record
from emag_export.runtime.request import default_request
from tests.conftest import small_model

LAYERS = {
    "transformer_blocks.0.attn.to_q": 2,
    "transformer_blocks.1.attn.add_k_proj": 3,
    "transformer_blocks.2.ff.net.0.proj": 4,
}
"""Layer to rank."""


def tensors_of(seed: int = 0, **extra: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    layers = dict(small_model().named_modules())
    tensors = {}
    for name, rank in LAYERS.items():
        layer: Any = layers[name]
        tensors[f"transformer.{name}.lora_A.weight"] = torch.randn(
            rank, layer.in_features, generator=generator
        )
        tensors[f"transformer.{name}.lora_B.weight"] = torch.randn(
            layer.out_features, rank, generator=generator
        )
    return tensors | extra


def saved(path: Path, tensors: dict[str, Tensor], **adapter: Any) -> Path:
    text = json.dumps({f"transformer.{name}": value for name, value in adapter.items()})
    save_file(tensors, path, metadata={"lora_adapter_metadata": text} if adapter else None)
    return path


def merged(*loras: Lora, precision: torch.dtype = torch.float32) -> dict[str, Tensor]:
    model = small_model().to(precision)
    merge_loras(model, loras)
    return dict(model.state_dict())


def product(tensors: dict[str, Tensor], name: str) -> Tensor:
    up, down = (tensors[f"transformer.{name}.lora_{part}.weight"] for part in "BA")
    return torch.einsum("or,ri->oi", up.double(), down.double())


def test_closed_form_of_several(tmp_path: Path) -> None:
    """Layers that a LoRA names change by the sum of scaled products, others by nothing."""
    one, two = tensors_of(1), tensors_of(2)
    half = "transformer_blocks.0.attn.to_q"
    two[f"transformer.{half}.alpha"] = torch.tensor(1.0)  # of rank 2: a factor of 0.5
    loras = [
        Lora(path=saved(tmp_path / "1.safetensors", one), scale=0.7),
        Lora(path=saved(tmp_path / "2.safetensors", two), scale=-1.5),
    ]
    before, after = small_model().state_dict(), merged(*loras)
    assert merged(*reversed(loras)).keys() == after.keys()
    for key, tensor in before.items():
        name = key.removesuffix(".weight")
        if name not in LAYERS or key == name:
            assert torch.equal(after[key], tensor), key
            continue
        factor = 0.5 if name == half else 1.0
        wanted = tensor.double() + 0.7 * product(one, name) - 1.5 * factor * product(two, name)
        # Float32 rounding of sums of a few numbers of size 10; 2e-6 was measured.
        torch.testing.assert_close(after[key].double(), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("adapter", "factors"),
    [
        ({"lora_alpha": 6, "r": 2}, (3, 2, 1.5)),
        ({"lora_alpha": 6, "r": 2, "use_rslora": True}, (6 / 2**0.5, 6 / 3**0.5, 6 / 4**0.5)),
        ({"lora_alpha": 6, "r": 2, "alpha_pattern": {"attn.add_k_proj": 30}}, (3, 10, 1.5)),
    ],
)
def test_alpha_in_the_metadata(adapter: dict[str, Any], factors: tuple[float, ...], tmp_path: Path) -> None:
    tensors = tensors_of()
    before = small_model().state_dict()
    after = merged(Lora(path=saved(tmp_path / "x.safetensors", tensors, **adapter)))
    for name, factor in zip(LAYERS, factors, strict=True):
        wanted = before[f"{name}.weight"].double() + factor * product(tensors, name)
        torch.testing.assert_close(after[f"{name}.weight"].double(), wanted, atol=1e-4, rtol=0)


def test_half_precision_is_rounded_once(tmp_path: Path) -> None:
    loras = [Lora(path=saved(tmp_path / f"{i}.safetensors", tensors_of(i)), scale=0.01) for i in range(8)]
    half, name = merged(*loras, precision=torch.float16), next(iter(LAYERS))
    assert half[f"{name}.weight"].dtype is torch.float16
    exact = small_model().state_dict()[f"{name}.weight"].half().double()
    exact = exact + sum(0.01 * product(tensors_of(i), name) for i in range(8))
    assert torch.equal(half[f"{name}.weight"], exact.float().half())


def test_peft_merges_the_same(tmp_path: Path) -> None:
    """diffusers' own loader and fusion, with alphas, ranks and a scale."""
    pytest.importorskip("peft")
    tensors = tensors_of()
    adapter = {"lora_alpha": 6, "r": 2, "target_modules": list(LAYERS)}
    adapter["rank_pattern"] = dict(LAYERS)
    path = saved(tmp_path / "x.safetensors", tensors, **adapter)
    theirs = small_model()
    theirs.load_lora_adapter(str(tmp_path), weight_name=path.name, prefix="transformer")
    theirs.fuse_lora(lora_scale=0.6)
    theirs.unload_lora()
    ours = merged(Lora(path=path, scale=0.6))
    for key, tensor in theirs.state_dict().items():
        torch.testing.assert_close(ours[key], tensor, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_encoder.text_model.x.lora_A.weight": torch.zeros(1, 1)}, "changes a text encoder"),
        ({"transformer.x.lora_magnitude_vector": torch.zeros(1)}, "no part of a diffusers LoRA"),
        ({"lora_unet_x.lora_down.weight": torch.zeros(1)}, "no part of a diffusers LoRA"),
        (
            {"transformer.nowhere.lora_A.weight": torch.zeros(1, 1)},
            "changes nowhere, .* no such linear layer",
        ),
        ({"transformer.pos_embed.proj.lora_A.weight": torch.zeros(1, 1)}, "no such linear layer"),
        (
            {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(2, 17)},
            r"A \(2, 17\) and B \(16, 2\); a layer of \(16, 16\) takes A \(r, 16\) and B \(16, r\)",
        ),
        ({"transformer.transformer_blocks.0.attn.to_k.lora_A.weight": torch.zeros(1, 16)}, "has no lora_B"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    """And nothing is changed, though the other layers of the file would fit."""
    path = saved(tmp_path / "x.safetensors", tensors_of() | change)
    model = small_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ModelError, match=message):
        merge_loras(model, [Lora(path=saved(tmp_path / "good.safetensors", tensors_of())), Lora(path=path)])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_empty_or_damaged_file(tmp_path: Path) -> None:
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(ModelError, match="has no tensors"):
        merge_loras(small_model(), [Lora(path=tmp_path / "empty.safetensors")])
    torch.save({"x": torch.zeros(1)}, tmp_path / "x.bin")
    with pytest.raises(ModelError, match="cannot be read as safetensors"):
        merge_loras(small_model(), [Lora(path=tmp_path / "x.bin")])


def test_command_line_form(tmp_path: Path) -> None:
    path = saved(tmp_path / "a:b.safetensors", tensors_of())
    assert parse_lora(str(path)) == Lora(path=path, scale=1.0)
    assert parse_lora(f"{path}:0.8") == Lora(path=path, scale=0.8)
    assert parse_lora(f"{path}:-1e-1") == Lora(path=path, scale=-0.1)
    for text, message in (
        (f"{path}:much", "the scale 'much'"),
        (f"{path}:nan", "finite"),
    ):
        with pytest.raises(InputError, match=message):
            parse_lora(text)
    for text in (f"{tmp_path}/none", f"{tmp_path}/none:1"):
        with pytest.raises(InputError, match="no LoRA file"):
            lora_records([parse_lora(text)])


def test_records_lead_back_to_the_files(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.safetensors", tensors_of())
    lora = Lora(path=path, scale=0.5)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    records = lora_records([lora])
    assert records == (LoraRecord(name=str(path), sha256=digest, scale=0.5),)
    assert recorded_loras(records) == [lora]
    saved(path, tensors_of(9))
    with pytest.raises(ModelError, match="not the one that was merged"):
        recorded_loras(records)
    path.unlink()
    with pytest.raises(ModelError, match="that was merged is needed"):
        recorded_loras(records)


def test_transformer_of_a_source_is_loaded_with_them(tmp_path: Path) -> None:
    """As build and the eager oracle load it."""
    source, name = find_source("tiny-sd3"), "transformer_blocks.0.attn.to_q"
    plain = load_transformer(source).state_dict()
    width = len(plain[f"{name}.weight"])
    tensors = {
        f"transformer.{name}.lora_A.weight": torch.ones(1, width),
        f"transformer.{name}.lora_B.weight": torch.ones(width, 1),
    }
    lora = Lora(path=saved(tmp_path / "x.safetensors", tensors), scale=0.25)
    with_lora = load_transformer(source, loras=[lora]).state_dict()
    for key, tensor in plain.items():
        wanted = tensor + 0.25 if key == f"{name}.weight" else tensor
        assert torch.equal(with_lora[key], wanted), key


def labelled(bundle: Path, target: Path, **contract: str) -> Path:
    """A copy that says of itself that a LoRA was merged: what is tested below looks at that alone."""
    shutil.copytree(bundle, target)
    manifest = json.loads((target / MANIFEST).read_text("utf-8"))
    manifest["source"]["loras"] = [{"name": "x.safetensors", "sha256": "0" * 64, "scale": 0.5}]
    manifest["contract"] |= contract
    (target / MANIFEST).write_text(json.dumps(manifest), "utf-8")
    return target


def test_a_picture_remembers_loras_and_is_not_taken_for_one_without(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    def draw(bundle: Path, *words: str) -> Result:
        named = ["generate", str(bundle), "--steps", "1", "-o", str(tmp_path / "a.png")]
        return CliRunner().invoke(main, [*named, *words])

    prompt = ("--prompt", "a large red circle on a blue background")
    styled = labelled(tiny_bundle, tmp_path / "styled")
    assert draw(tiny_bundle, *prompt).exit_code == 0
    assert "already there" in draw(tiny_bundle, *prompt).stdout
    refused = draw(styled, *prompt)
    assert refused.exit_code == 2 and "was made otherwise" in " ".join(refused.stderr.split())
    like = draw(styled, "--like", str(tmp_path / "a.png"), "--overwrite")
    assert like.exit_code == 0 and "was made with other weights" in " ".join(like.stderr.split())
    record = read_picture_record(tmp_path / "a.png")
    assert record.loras == Bundle(styled).provenance.loras and record.same_weights(Bundle(styled))
    other = labelled(tiny_bundle, tmp_path / "other", variant="emag")
    assert not record.made_by(Bundle(other), record.request), "another variant draws another picture"
    back = draw(tiny_bundle, "--like", str(tmp_path / "a.png"), "--overwrite")
    assert "other weights (tiny-sd3 with x.safetensors)" in " ".join(back.stderr.split())


def test_variants_of_one_model_have_the_same_loras(tiny_bundle: Path, tmp_path: Path) -> None:
    """In an evaluation and in a measurement: what differs would be the LoRA."""
    plain, styled = Bundle(tiny_bundle), Bundle(labelled(tiny_bundle, tmp_path / "b", variant="identity"))
    asked = Evaluation(
        bundles=(plain, styled), methods=("cfg", "emag"), prompts=("a",), models=MetricModels(), keywords={}
    )
    with pytest.raises(InputError, match=r"was made of another model than .*, or with other LoRAs"):
        check_evaluation(asked)
    with pytest.raises(InputError, match=r"was made of another model than .*, or with other LoRAs"):
        Setup(bundles=(plain, styled), backends={}, request=default_request(plain, "a"))
