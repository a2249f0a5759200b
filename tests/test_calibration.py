"""Ranges are what a run shows; an interrupted calibration goes on; large models are read layer by layer."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from emag_export.calibration import open as opening
from emag_export.calibration.measure import measure_ranges
from emag_export.calibration.streamed import read_when_used
from emag_export.errors import ExportError, InputError
from emag_export.exporter.describe.identify import BuildPlan, identify
from emag_export.exporter.source.load import load_transformer, open_transformer
from emag_export.options import BuildOptions
from emag_export.progress import Event
from emag_export.quantisation import Scheme
from tests.quantised import in_blocks

STEPS = 3


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("a red circle\n\n  a small blue square \n", "utf-8")
    return file


@pytest.fixture(scope="module")
def plan(small_pipeline: Path, prompts: Path) -> BuildPlan:
    options = BuildOptions(
        quantize=Scheme.FP8,
        emag_candidates=(1, 2),
        calibration_prompts=prompts,
        calibration_steps=STEPS,
    )
    return identify(str(small_pipeline), options)


def test_ranges_are_those_of_a_run_in_pytorch(plan: BuildPlan, tmp_path: Path) -> None:
    """Of every linear of the blocks, and of three parts of every attention."""
    events: list[Event] = []
    ranges = measure_ranges(plan, tmp_path, events.append)
    model = load_transformer(plan.source)
    assert set(in_blocks(model)) <= set(ranges)
    parts = [name.split(".")[2] for name in ranges if name.startswith("attention.")]
    # Four blocks with a joint attention each, of which two have a second one.
    assert sorted(parts) == sorted([*["query"] * 6, *["key"] * 6, *["value"] * 6])
    assert all(largest > 0 for largest in ranges.values())
    assert [(e.done, e.total) for e in events if e.phase == "step"] == [(i, 6) for i in range(1, 7)]


def test_an_interrupted_calibration_goes_on_where_it_was(
    plan: BuildPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = measure_ranges(plan, _folder(tmp_path / "whole"))
    folder = _folder(tmp_path / "stopped")
    for stop in (2, 5):  # within the first prompt, and within the second

        def interrupt(event: Event, stop: int = stop) -> None:
            if event.phase == "step" and event.done == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            measure_ranges(plan, folder, interrupt)
    steps: list[int] = []
    again = measure_ranges(plan, folder, lambda e: steps.append(e.done) if e.phase == "step" else None)
    assert steps == [6], "one step was left"
    assert again == wanted


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def test_a_damaged_state_begins_again(plan: BuildPlan, tmp_path: Path) -> None:
    (tmp_path / "state.safetensors").write_bytes(b"half of a file")
    assert measure_ranges(plan, tmp_path)


def test_large_models_are_read_layer_by_layer(
    plan: BuildPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same ranges, text encoders included."""
    wanted = measure_ranges(plan, _folder(tmp_path / "whole"))
    monkeypatch.setattr(opening, "_WHOLE_BYTES", 0)
    monkeypatch.setattr("emag_export.exporter.source.load.READ_AT_ONCE", 64)
    assert measure_ranges(plan, _folder(tmp_path / "streamed")) == pytest.approx(wanted, rel=1e-6)


def test_weights_are_there_in_their_layer_alone(plan: BuildPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emag_export.exporter.source.load.READ_AT_ONCE", 64)
    opened = open_transformer(plan.source)
    assert opened is not None
    model, reserved = opened
    layer = model.transformer_blocks[0].attn.to_q
    place = layer.weight
    wanted = load_transformer(plan.source).transformer_blocks[0].attn.to_q
    x = torch.randn(2, layer.in_features)
    with read_when_used(model):
        assert torch.equal(layer(x), wanted(x))
        assert layer.weight is place
    reserved.check()
    assert layer(x).abs().max() < wanted(x).abs().max(), "without it, the place has no numbers"
    with pytest.raises(ExportError, match="looked at"):
        reserved.check()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"calibration_steps": 4}, "`calibration_steps` is for `quantize` fp8"),
        ({"quantize": Scheme.W8, "fp8_attention": True}, "`fp8_attention` is for `quantize` fp8"),
        ({"quantize": Scheme.INT8, "calibration_size": 64}, "`calibration_size` is for `quantize` fp8"),
        ({"quantize": Scheme.FP8, "calibration_steps": 0}, "`calibration_steps` is 0; give at least 1"),
    ],
)
def test_options_that_say_nothing_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        BuildOptions(**options)


def test_a_size_that_the_model_does_not_draw(small_pipeline: Path) -> None:
    options = BuildOptions(quantize=Scheme.FP8, emag_candidates=(1,), calibration_size=100)
    with pytest.raises(InputError, match=r"`calibration_size` is 100: .*multiple"):
        identify(str(small_pipeline), options)


def test_prompts_that_cannot_be_read(small_pipeline: Path, tmp_path: Path) -> None:
    options = BuildOptions(quantize=Scheme.FP8, emag_candidates=(1,))
    for content, said in (
        (None, "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"\n \n", "has no prompt"),
    ):
        file = tmp_path / "prompts.txt"
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(InputError, match=said):
            identify(str(small_pipeline), replace(options, calibration_prompts=file))


def test_the_prompts_decide_the_bundle_and_not_where_they_are(
    small_pipeline: Path, prompts: Path, tmp_path: Path
) -> None:
    """``identify`` names a bundle by what is measured: two files of the same prompts are one calibration."""
    elsewhere = tmp_path / "copy.txt"
    elsewhere.write_bytes(prompts.read_bytes())
    other = tmp_path / "other.txt"
    other.write_text("a green star", "utf-8")
    base = BuildOptions(quantize=Scheme.FP8, emag_candidates=(1,))
    keys = [
        identify(str(small_pipeline), replace(base, **changed)).key
        for changed in (
            {"calibration_prompts": prompts},
            {"calibration_prompts": elsewhere},
            {"calibration_prompts": other},
            {"calibration_prompts": prompts, "calibration_steps": 9},
            {},
            {"quantize": None},
        )
    ]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 5


def test_classes_are_calibrated_on_classes(dit_pipeline: Path, tmp_path: Path) -> None:
    options = BuildOptions(quantize=Scheme.FP8, calibration_steps=2)
    plan = identify(str(dit_pipeline), options)
    assert plan.quantisation is not None and plan.quantisation.calibration is not None
    assert plan.quantisation.calibration.prompts == tuple(str(index * 10 // 8) for index in range(8))
    ranges = measure_ranges(plan, tmp_path)
    assert set(in_blocks(load_transformer(plan.source))) <= set(ranges)
