"""Whole bundles against the reference: in half precision, without encoders, and where memory is short."""

import gc
import json
import subprocess
import sys
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from emag_export.bundle import DENOISER, MANIFEST, Bundle
from emag_export.engines.observed import ObservedEngine
from emag_export.engines.protocol import Engine
from emag_export.errors import InputError
from emag_export.exporter.eager import open_eager, source_of
from emag_export.exporter.source.load import load_recorded
from emag_export.kinds import Variant
from emag_export.progress import Event
from emag_export.reference import check_bundle as checking
from emag_export.reference import memory
from emag_export.reference.check_bundle import check_bundle
from emag_export.runtime.request import GenerationRequest, default_request
from emag_export.runtime.text.encoders import random_encoder
from tests.bundles import TinyBundles, once, opener
from tests.sd3 import EMBEDS, POOLED

STEPS = 3
PLENTY, SCARCE, NONE = 10**12, 10**9, 10**6
"""Bytes: everything fits, the recording of tiny-sd3 fits but no engine beside its model, nothing fits."""


def requests(bundle: Bundle, *prompts: str) -> list[GenerationRequest]:
    base = replace(default_request(bundle, "-"), steps=STEPS)
    return [
        replace(base, prompt=prompt, seed=seed) for seed, prompt in enumerate(prompts or ("a red circle",))
    ]


@pytest.fixture(scope="session")
def denoiser_only(shared_folder: Path, tiny_bundle: Path) -> Path:
    """What ``--components transformer`` leaves of tiny-sd3, without a second export."""
    return once(shared_folder / "tiny-denoiser", lambda path: _keep_denoiser(tiny_bundle, path))


def _keep_denoiser(whole: Path, path: Path) -> None:
    path.mkdir()
    for name in (DENOISER, "scheduler", "model_index.json"):
        (path / name).symlink_to(whole / name)
    manifest = json.loads((whole / MANIFEST).read_text("utf-8"))
    manifest["graphs"] = {DENOISER: manifest["graphs"][DENOISER]}
    kept = (f"{DENOISER}/", "scheduler/", "model_index.json")
    manifest["files"] = {name: record for name, record in manifest["files"].items() if name.startswith(kept)}
    (path / MANIFEST).write_text(json.dumps(manifest), "utf-8")


@pytest.fixture(scope="session")
def float16_denoiser(shared_folder: Path, tiny_bundles: TinyBundles) -> Path:
    """The denoiser of tiny-sd3 in float16."""
    whole = tiny_bundles(Variant.EMAG_Q, "float16")
    return once(shared_folder / "tiny-half", lambda path: _keep_denoiser(whole, path))


def have(monkeypatch: pytest.MonkeyPatch, available: int) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: available)


def test_a_float16_graph_loses_less_than_pytorch(float16_denoiser: Path) -> None:
    """onnxruntime computes float16 in float32 on a CPU; measured 0.31 to 0.70 of PyTorch's error."""
    bundle = Bundle(float16_denoiser)
    result = check_bundle(bundle, opener(threads=1), requests(bundle))
    assert result.failures() == []
    assert result.floor is not None
    assert 0.1 < result.floor.ratio < 1
    assert all(set(step.floor) == set(step.errors) for step in result.steps)


def test_the_floor_is_measured_only_where_it_says_something(
    float16_denoiser: Path, tiny_bundle: Path
) -> None:
    for bundle, floor in ((Bundle(float16_denoiser), False), (Bundle(tiny_bundle), True)):
        assert check_bundle(bundle, opener(threads=1), requests(bundle), floor=floor).floor is None


def test_recording_first_changes_no_number(float16_denoiser: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle(float16_denoiser)
    told, found = [], []
    asked = [replace(r, guidance=replace(r.guidance, name="emag+cads")) for r in requests(bundle)]
    for available in (PLENTY, SCARCE):
        have(monkeypatch, available)
        events: list[Event] = []
        result = check_bundle(bundle, opener(threads=1), asked, progress=events.append)
        found.append(result.to_json())
        told.append([(event.done, event.total) for event in events])
    assert [data["settings"].pop("order") for data in found] == [
        "side by side",
        "reference recorded first, to save memory",
    ]
    assert found[0] == found[1]
    assert told == [[(done, n * STEPS) for done in range(1, n * STEPS + 1)] for n in (2, 3)]


@pytest.mark.parametrize(("available", "together"), [(PLENTY, True), (SCARCE, False)])
def test_where_memory_is_short_the_model_is_gone_before_the_engine_comes(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, available: int, together: bool
) -> None:
    models: list[weakref.ref[Any]] = []
    ran: list[bool] = []

    def load(*arguments: Any) -> Any:
        model = load_recorded(*arguments)
        models.append(weakref.ref(model))
        return model

    have(monkeypatch, available)
    monkeypatch.setattr(checking, "load_recorded", load)
    bundle = Bundle(tiny_bundle)

    def watched(bundle: Bundle, component: str) -> Engine:
        """Says at every call of the denoiser whether the reference's model is still there."""
        engine = opener(threads=1)(bundle, component)
        if component != DENOISER:
            return engine
        return ObservedEngine(engine, before=lambda _: ran.append(bool(models) and models[0]() is not None))

    gc.disable()  # what is only freed by the collector may be freed too late
    try:
        check_bundle(bundle, watched, requests(bundle))
    finally:
        gc.enable()
    assert len(models) == 1
    assert ran[:STEPS] == [together] * STEPS


def test_a_recording_that_does_not_fit_is_refused(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor a model that does not fit by itself, which fewer steps would not help."""
    bundle = Bundle(tiny_bundle)
    model = sum(record.bytes for name, record in bundle.files.items() if name.startswith("transformer/"))
    have(monkeypatch, model + 1000)
    with pytest.raises(InputError, match=r"the averages of its 3 steps .* fewer `steps`"):
        check_bundle(bundle, opener(threads=1), requests(bundle))
    have(monkeypatch, NONE)
    with pytest.raises(InputError, match=r"the whole source model in PyTorch .* or compare a smaller model"):
        check_bundle(bundle, opener(threads=1), requests(bundle))


def test_a_denoiser_alone_is_compared_on_random_embeddings(denoiser_only: Path) -> None:
    """Measured: velocities to 1e-5, as with embeddings of prompts."""
    bundle = Bundle(denoiser_only)
    result = check_bundle(bundle, opener(threads=1), requests(bundle, "a red circle", "a blue square"))
    assert result.failures() == []
    assert result.pictures == ()
    assert result.settings["embeddings"].startswith("random")
    assert f"{EMBEDS} [40, " in result.settings["embeddings"]  # 20 tokens of CLIP, 20 of T5
    assert len(result.steps[0].reference_delta) == 2


def test_a_denoiser_alone_fails_when_it_is_another_one(
    denoiser_only: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(*arguments: Any) -> Any:
        model = load_recorded(*arguments)
        with torch.no_grad():
            model.transformer_blocks[2].ff.net[2].weight[3] += 0.5
        return model

    monkeypatch.setattr(checking, "load_recorded", damaged)
    bundle = Bundle(denoiser_only)
    assert not check_bundle(bundle, opener(threads=1), requests(bundle)).passed


def test_random_embeddings_belong_to_their_prompt(denoiser_only: Path) -> None:
    encode = random_encoder(Bundle(denoiser_only))
    both, again = encode(["a", "b"]), encode(["b"])
    embeds = both.tensors[EMBEDS]
    assert torch.equal(embeds[1:], again.tensors[EMBEDS])
    assert torch.equal(both.tensors[POOLED][1:], again.tensors[POOLED])
    assert not torch.equal(embeds[0], embeds[1])
    assert abs(float(embeds.std()) - 1) < 0.05  # of 10 240 numbers: 1 ± 0.007
    assert abs(float(embeds.mean())) < 0.05


@pytest.fixture
def bfloat16(denoiser_only: Path, tmp_path: Path) -> Iterator[Path]:
    """The same in bfloat16, whose graph no CPU provider runs: it is not there."""
    manifest = json.loads((denoiser_only / MANIFEST).read_text("utf-8"))
    contract = manifest["contract"]
    contract["precision"] = "bfloat16"
    contract["conditioning"] = [{**tensor, "dtype": "bfloat16"} for tensor in contract["conditioning"]]
    for name in ("scheduler", "model_index.json"):
        (tmp_path / name).symlink_to(denoiser_only / name)
    (tmp_path / MANIFEST).write_text(json.dumps(manifest), "utf-8")
    yield tmp_path


def test_bfloat16_is_compared_in_pytorch(bfloat16: Path) -> None:
    bundle = Bundle(bfloat16)
    result = check_bundle(bundle, open_eager(source_of(bundle)), requests(bundle))
    assert result.failures() == []
    assert result.floor is not None
    assert result.floor.ratio == 1, "the engine is the floor"


def test_the_command_line_says_what_was_compared_with_what(bfloat16: Path) -> None:
    command = [sys.executable, "-m", "emag_export.cli.main", "compare", str(bfloat16), "--backend", "torch"]
    more = ["--steps", "1", "--height", "32", "--width", "32"]
    done = subprocess.run([*command, *more], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "embeddings: random" in done.stdout
    assert "the bundle has no decoder" in done.stdout
    assert "passed the bfloat16 thresholds" in done.stdout
