"""Memory by formula against the tensors that the runtime allocates; the estimate against its own limits."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from emag_export.bundle import DENOISER, MANIFEST, Bundle
from emag_export.contract import DenoiserContract
from emag_export.engines.eager import EagerEngine
from emag_export.engines.observed import ObservedEngine
from emag_export.errors import InputError
from emag_export.exporter.graph.fork import fork
from emag_export.footprint import Footprint, footprint
from emag_export.kinds import KINDS, Variant
from emag_export.manifest import FileRecord, Manifest, Provenance
from emag_export.models import SamplingDefaults
from emag_export.records import dump_record
from emag_export.runtime.guidance.rules import Guidance
from emag_export.runtime.sampling.call import calls_of, place_calls
from emag_export.runtime.sampling.plan import EmagWindows, Phase, make_plan
from emag_export.runtime.sampling.schedule import Schedule
from emag_export.runtime.sampling.state import RunState
from emag_export.runtime.step import step
from emag_export.sizes import Geometry, TextRange
from tests.conftest import small_fork
from tests.sd3 import conditioning

HEIGHT, WIDTH, CLIP_TOKENS, T5_TOKENS, FACTOR = 96, 64, 5, 6, 8
FILES = {f"{DENOISER}/model.onnx": 300, f"{DENOISER}/model.onnx.data": 7000, "vae_decoder/model.onnx": 90}


def bundle_of(contract: DenoiserContract, folder: Path) -> Bundle:
    """A manifest and nothing else: the formula may look at no file."""
    folder.mkdir(exist_ok=True)
    defaults = SamplingDefaults(
        height=HEIGHT, width=WIDTH, candidates=contract.blocks, max_sequence_length=T5_TOKENS
    )
    text = TextRange(least=CLIP_TOKENS, usual=CLIP_TOKENS + T5_TOKENS, most=CLIP_TOKENS + T5_TOKENS)
    manifest = Manifest(
        key="",
        contract=contract,
        geometry=Geometry(pixels_per_latent=FACTOR, text=text),
        defaults=defaults,
        files={name: FileRecord(bytes=size, sha256="") for name, size in FILES.items()},
        graphs={DENOISER: contract.graph},
        precision_notes={},
        preview=None,
        source=Provenance(model="none", revision=None, fingerprint="", versions={}),
    )
    (folder / MANIFEST).write_text(dump_record(manifest))
    return Bundle(folder)


def nbytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("state_dtype", ["float32", "float16"])
@pytest.mark.parametrize("variant", [Variant.EMAG_Q, Variant.EMAG])
def test_averages_inputs_and_outputs_are_those_of_the_runtime(
    variant: Variant, state_dtype: str, tmp_path: Path
) -> None:
    images, model = 2, small_fork("sd3", variant).model
    contract = replace(small_fork("sd3", variant).contract, state_dtype=state_dtype)
    windows = EmagWindows(delta=0)
    plan = make_plan(contract, Schedule.flow((1.0, 0.0), (500.0,)), Guidance(), windows)
    assert plan.steps[0].phase == Phase.GUIDE
    latents = torch.randn(images, contract.channels, HEIGHT // FACTOR, WIDTH // FACTOR)
    embeds, pooled = torch.randn(images, CLIP_TOKENS + T5_TOKENS, 16), torch.randn(images, 8)
    given = conditioning(embeds, pooled, embeds, pooled)
    run = RunState.start(contract, latents, given.given)
    seen = 0

    def look(feeds: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """Bytes of everything in a call but the averages."""
        nonlocal seen
        tensors = {**feeds, **outputs}
        seen = nbytes(*(tensors[name] for name in tensors if not name.startswith("ema_state")))

    engine = ObservedEngine(EagerEngine(fork(model, contract), contract.graph), after=look)
    (call,) = place_calls(calls_of(plan, images), contract, engine.device)
    step(engine, call, run, given.trunk(call.rows))
    got = footprint(bundle_of(contract, tmp_path), images=images, height=HEIGHT, width=WIDTH)
    assert got.averages == nbytes(run.average, run.spare)
    assert got.transfers == seen
    assert got.weights == 7300, "files of the denoiser only"
    assert got.total == got.weights + got.averages + got.transfers + got.working


def unlimited(variant: Variant) -> DenoiserContract:
    """Of a model that draws pictures of any size: only in large ones do the terms come apart."""
    return replace(small_fork("sd3", variant).contract, limits={})


def at(bundle: Bundle, images: int = 1, side: int = 64, *, fused: bool | None = None) -> Footprint:
    return footprint(bundle, images=images, height=side, width=side, fused=fused)


@pytest.mark.parametrize("variant", Variant)
def test_images_add_up_and_scores_are_what_fusing_saves(variant: Variant, tmp_path: Path) -> None:
    bundle = bundle_of(unlimited(variant), tmp_path)
    one, three = at(bundle), at(bundle, 3)
    for part in ("averages", "transfers", "working"):
        assert getattr(three, part) == pytest.approx(3 * getattr(one, part), abs=2), part  # rounding
    assert three.weights == one.weights
    assert at(bundle, fused=True).working <= one.working
    # Scores and maps grow with the square of the tokens, everything else in step with them.
    large, larger = at(bundle, side=8192), at(bundle, side=16384)
    assert 15 < larger.working / large.working < 16
    fused, larger_fused = at(bundle, side=8192, fused=True), at(bundle, side=16384, fused=True)
    assert fused.working < large.working
    growth = larger_fused.working / fused.working
    linear = variant == Variant.EMAG_Q or KINDS[variant].averages is None
    assert 3.9 < growth < 4.01 if linear else growth > 4


def test_a_bundle_with_a_graph_for_onnxruntime_is_fused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name is the backend's: what ``open_backend`` asks a bundle for."""
    contract = unlimited(Variant.EMAG_Q)
    plain = bundle_of(contract, tmp_path / "a")
    monkeypatch.setitem(FILES, f"{DENOISER}/onnxruntime.onnx", 10)
    own = bundle_of(contract, tmp_path / "b")
    assert at(own, side=8192).working == at(plain, side=8192, fused=True).working
    assert at(plain, side=8192).working == at(own, side=8192, fused=False).working


def test_half_precision_is_computed_in_float32(tmp_path: Path) -> None:
    """onnxruntime on a CPU holds the weights in float32, too."""
    contract = small_fork("sd3").contract
    full = at(bundle_of(contract, tmp_path / "a"))
    half = at(bundle_of(replace(contract, precision="float16"), tmp_path / "b"))
    assert half.working == full.working + full.weights
    assert half.transfers < full.transfers


def test_sizes_that_cannot_be_drawn(tmp_path: Path) -> None:
    bundle = bundle_of(small_fork("sd3").contract, tmp_path)
    with pytest.raises(InputError, match="give at least 1"):
        at(bundle, images=0)
    with pytest.raises(InputError, match="`height` 40 is no multiple of 16"):
        at(bundle, side=40)
    with pytest.raises(InputError, match=r"`height` 208 is more than this model's .* covers: 192"):
        at(bundle, side=208)
