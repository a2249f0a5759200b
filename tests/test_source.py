"""Source models: which files count, what is refused, and how much memory their weights take."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.utils import logging as transformers_logging

from emag_export.errors import ModelError
from emag_export.exporter.source.find import find_source
from emag_export.exporter.source.load import load_component, load_transformer
from emag_export.families.source_model import SourceModel
from emag_export.tiny_sd3 import MODEL_DIR

SHARD = "100KB"


def resaved(
    target: Path, *, shard: str | None = None, variant: str | None = None, half: bool = False
) -> Path:
    """tiny-sd3 as diffusers saves it with these options."""
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(MODEL_DIR)
    if half:
        pipeline.to(torch.float16)
    sizes = {} if shard is None else {"max_shard_size": shard}
    pipeline.save_pretrained(target, variant=variant, **sizes)
    return target


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return resaved(tmp_path_factory.mktemp("sharded"), shard=SHARD)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return model.state_dict()


def assert_same_weights(got: nn.Module, wanted: nn.Module) -> None:
    assert state(got).keys() == state(wanted).keys()
    for name, tensor in state(got).items():
        assert torch.equal(tensor, state(wanted)[name]), name


FOLDERS = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")


def loaded(source: SourceModel, folder: str) -> nn.Module:
    """One component in float32."""
    if folder == "transformer":
        model: nn.Module = load_transformer(source)
        return model
    part = next(part for part in source.family.components if part.folder == folder)
    return load_component(source, part, "float32")


@pytest.mark.parametrize("component", FOLDERS)
def test_shards_hold_the_same_weights(component: str, sharded: Path) -> None:
    assert len(list((sharded / component).glob("*.safetensors"))) > 1
    whole, parts = find_source("tiny-sd3"), find_source(str(sharded))
    assert_same_weights(loaded(parts, component), loaded(whole, component))


def test_shards_are_counted_and_fingerprinted(sharded: Path) -> None:
    source = find_source(str(sharded))
    on_disk = list(sharded.glob("*/*.safetensors"))
    assert source.weight_bytes() == sum(path.stat().st_size for path in on_disk)
    assert source.weight_bytes("vae") == sum(
        path.stat().st_size for path in on_disk if path.parent.name == "vae"
    )
    before = source.fingerprint()
    shard = sorted((sharded / "transformer").glob("*.safetensors"))[-1]
    original = shard.read_bytes()
    shard.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    try:
        assert source.fingerprint() != before
    finally:
        shard.write_bytes(original)


def test_missing_shard_is_named_before_anything_is_loaded(tmp_path: Path) -> None:
    source = resaved(tmp_path / "m", shard=SHARD)
    shard = sorted((source / "text_encoder_2").glob("*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(
        ModelError, match=rf"{shard.name} is missing, model\.safetensors\.index\.json names it"
    ):
        find_source(str(source))


def test_no_weights_at_all(tmp_path: Path) -> None:
    source = resaved(tmp_path / "m")
    (source / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"vae has no weights \(\*\.safetensors\)"):
        find_source(str(source))


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.ckpt", "weights.pt"])
def test_pickled_weights_are_refused(name: str, tmp_path: Path) -> None:
    source = resaved(tmp_path / "m")
    (source / "transformer" / "diffusion_pytorch_model.safetensors").rename(source / "transformer" / name)
    with pytest.raises(ModelError, match=rf"pickled \({name}\).*safe_serialization=True"):
        find_source(str(source))


def test_pickled_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sd3.ckpt"
    torch.save({"x": torch.zeros(1)}, path)
    with pytest.raises(ModelError, match="pickle"):
        find_source(str(path))


@pytest.mark.parametrize("shard", [None, SHARD])
def test_half_precision_variant_is_read_where_there_is_no_other(shard: str | None, tmp_path: Path) -> None:
    """Loaded as float32, its weights are those of the checkpoint rounded to float16."""
    source = find_source(str(resaved(tmp_path / "m", shard=shard, variant="fp16", half=True)))
    assert source.variant("transformer") == "fp16"
    whole = find_source("tiny-sd3")
    for component in ("transformer", "text_encoder"):
        got, wanted = loaded(source, component), loaded(whole, component)
        assert_same_weights(got, wanted.half().float())


def test_half_precision_variant_beside_the_weights_changes_nothing(tmp_path: Path) -> None:
    folder = resaved(tmp_path / "m")
    before = find_source(str(folder)).fingerprint(), find_source(str(folder)).weight_bytes()
    for path in resaved(tmp_path / "half", shard=SHARD, variant="fp16", half=True).glob("*/*fp16*"):
        shutil.copy(path, folder / path.parent.name)
    source = find_source(str(folder))
    assert len(list(folder.glob("*/*fp16*"))) > 10
    assert (source.fingerprint(), source.weight_bytes()) == before
    assert source.variant("text_encoder_3") is None
    assert_same_weights(load_transformer(source), load_transformer(find_source("tiny-sd3")))


_MEASURE = """
import sys, threading, time
from pathlib import Path
import torch
from emag_export.exporter.source.load import _load
from emag_export.families import FAMILIES
from emag_export.families.source_model import SourceModel
import diffusers, transformers
diffusers.SD3Transformer2DModel, transformers.T5EncoderModel
def memory(field):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(field + ":"))
field, precision, folder, library, model_class = sys.argv[1:]
source = SourceModel(name="m", path=Path(folder), revision=None, index={"c": [library, model_class]},
    family=FAMILIES["sd3"])
before = peak = memory(field)
def watch():
    global peak
    while not done:
        peak = max(peak, memory(field))
        time.sleep(0.002)
done = False
thread = threading.Thread(target=watch)
thread.start()
SourceModel.variant = lambda self, component: None
model = _load(source, "c", library, model_class, precision)
sum(float(tensor.sum()) for tensor in model.parameters())
done = True
thread.join()
print(peak - before, sum(tensor.nbytes for tensor in model.parameters()))
"""


def _save_large(kind: str, folder: Path) -> None:
    """About 500 MB, in shards."""
    if kind == "SD3Transformer2DModel":
        from diffusers import SD3Transformer2DModel

        model: Any = SD3Transformer2DModel(
            sample_size=32,
            num_layers=4,
            attention_head_dim=64,
            num_attention_heads=16,
            joint_attention_dim=1024,
            caption_projection_dim=1024,
            pooled_projection_dim=512,
            pos_embed_max_size=16,
        )
    else:
        from transformers import T5Config, T5EncoderModel

        sizes = {"d_model": 1024, "d_ff": 2816, "d_kv": 64, "num_heads": 16, "num_layers": 7}
        model = T5EncoderModel(T5Config(vocab_size=32128, feed_forward_proj="gated-gelu", **sizes))
    model.save_pretrained(folder, max_shard_size="150MB")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from Linux's /proc")
@pytest.mark.slow
@pytest.mark.parametrize("model_class", ["SD3Transformer2DModel", "T5EncoderModel"])
def test_loading_holds_one_copy_of_the_weights(model_class: str, tmp_path: Path) -> None:
    """As saved, all resident memory counts. Rounded to float16, memory of the process's own counts: pages of
    the file that the system may drop at any time do not. 1.00 to 1.06 was measured, two copies are 2.
    """
    library = "diffusers" if model_class.startswith("SD3") else "transformers"
    _save_large(model_class, tmp_path / "c")
    for field, precision in (("VmRSS", "float32"), ("RssAnon", "float16")):
        command = [sys.executable, "-c", _MEASURE, field, precision, str(tmp_path), library, model_class]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        peak, weights = map(int, output.split())
        assert weights > (450e6 if precision == "float32" else 220e6)
        # The margin above 1.15 is for what the libraries import when they first load.
        assert peak <= 1.15 * weights + 40e6, (field, precision, peak, weights)


def test_nothing_is_drawn_while_weights_are_loaded(capfd: pytest.CaptureFixture[str]) -> None:
    """transformers draws a bar, which is on again afterwards."""
    source = find_source("tiny-sd3", revision=None)
    before = transformers_logging.is_progress_bar_enabled()
    transformers_logging.enable_progress_bar()
    try:
        load_component(source, source.family.component("text_encoder"), "float32")
        assert transformers_logging.is_progress_bar_enabled()
    finally:
        if not before:
            transformers_logging.disable_progress_bar()
    drawn = capfd.readouterr()
    assert "Loading" not in drawn.err + drawn.out
