"""Quantised bundles from the command line: build, inspect, compare, compile; and what is refused."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from emag_export.bundle import RANGES, Bundle
from emag_export.calibration.measure import measure_ranges
from emag_export.cli.main import main
from emag_export.engines.tensorrt.build import plan_engine_build
from emag_export.engines.tensorrt.flavour import flavour_of
from emag_export.engines.tensorrt.options import EngineOptions
from emag_export.errors import InputError
from emag_export.exporter.build import build
from emag_export.exporter.describe.identify import identify
from emag_export.options import BuildOptions
from emag_export.progress import Event
from emag_export.quantisation import Scheme
from tests.bundles import once

ADA_AND_BLACKWELL = ("sm89", "sm120")
LAYERS = 4 * 2
"""Modulations of the small pipeline: two in each of its four blocks."""


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture(scope="module")
def fp8_bundle(shared_folder: Path, small_pipeline: Path) -> Path:
    """The denoiser of the small pipeline. Read-only: copy it to change it."""

    def make(path: Path) -> None:
        build(str(small_pipeline), path, _options(Scheme.FP8), calibrate=measure_ranges)

    return once(shared_folder / "small-fp8", make)


def _options(scheme: Scheme, **more: Any) -> BuildOptions:
    if scheme == Scheme.FP8:
        more = {"calibration_steps": 2, **more}
    if scheme != Scheme.INT8:
        more = {"precision": "float16", **more}
    return BuildOptions(quantize=scheme, emag_candidates=(1, 2), components=("transformer",), **more)


def test_it_says_how_it_was_quantised_and_is_built_again_so(fp8_bundle: Path, small_pipeline: Path) -> None:
    bundle = Bundle(fp8_bundle)
    quantisation = bundle.quantisation
    assert quantisation is not None and quantisation.calibration is not None
    assert (quantisation.scheme, len(quantisation.calibration.prompts)) == (Scheme.FP8, 8)
    assert RANGES in bundle.files and all(largest > 0 for largest in bundle.ranges().values())
    assert identify(str(small_pipeline), bundle.options).key == bundle.key
    phases: list[str] = []
    build(str(small_pipeline), fp8_bundle, bundle.options, progress=lambda event: phases.append(event.phase))
    assert phases[-1] == "reuse", "nothing is measured again"


def test_inspect_shows_scheme_and_ranges(fp8_bundle: Path) -> None:
    shown = run("inspect", fp8_bundle)
    assert shown.exit_code == 0, shown.output
    said = " ".join(shown.output.split())
    assert "float16 + fp8" in said
    assert "ranges over 8 built-in prompts, 2 steps, 64 pixels" in said
    found = json.loads(run("inspect", fp8_bundle, "--json").output)
    assert found["quantisation"]["scheme"] == "fp8"
    assert found["ranges"] == dict(Bundle(fp8_bundle).ranges())


def test_compare_judges_what_is_left_of_the_direction(fp8_bundle: Path, tmp_path: Path) -> None:
    """An untrained model rounds worse than tiny-sd3: what counts here is what is compared with what."""
    words = ("--steps", "6", "--report", tmp_path)
    done = run("compare", fp8_bundle, *words, "--json")
    assert done.exit_code in (0, 8), done.output
    found = json.loads(done.stdout)
    assert set(found["direction_floors"]) == {"float16", "bfloat16"}
    assert found["threshold"]["direction"]["error"] == 0.25
    floors, own = found["direction_floors"], found["direction"]
    assert 0 < floors["float16"]["error"] < floors["bfloat16"]["error"]
    assert 0.01 < own["error"] < 1
    assert own["projection"] == pytest.approx(1, abs=0.2)
    guided = [step for step in found["steps"] if step["phase"] == "guide"]
    assert all(set(step["direction_floors"]) == set(floors) for step in guided)
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "c - p, along which guidance steers" in page and "PyTorch in bfloat16" in page


@pytest.mark.parametrize("scheme", [pytest.param(Scheme.W8, marks=pytest.mark.rehearsal), Scheme.FP8])
def test_engines_multiply_in_eight_bits(
    scheme: Scheme, fp8_bundle: Path, small_pipeline: Path, tmp_path: Path
) -> None:
    """For GPUs of two generations in one plan, whose text says what its products are made of."""
    path = tmp_path / "bundle"
    if scheme == Scheme.FP8:
        shutil.copytree(fp8_bundle, path)
    else:
        build(str(small_pipeline), path, _options(scheme))
    rtx = flavour_of("tensorrt-rtx")
    if not rtx.version().startswith("1.7."):
        pytest.skip("the text in a plan is not documented; it was read in TensorRT-RTX 1.7")
    work = plan_engine_build(Bundle(path), rtx, EngineOptions(targets=ADA_AND_BLACKWELL, max_images=1))
    record = work.run()["transformer"]
    text = _text_of((work.folder.path / record.file).read_bytes())
    types = _operand_types(text)
    assert types.count("int8") >= LAYERS if scheme == Scheme.FP8 else types.count("int8") >= 4 * LAYERS
    assert ("fp8_e4m3" in types) == (scheme == Scheme.FP8)
    attentions = re.findall(r"fmha::(\w+)_traits", text)
    assert attentions and not any("e4m3" in kind for kind in attentions), "fused, and in half precision"


def _text_of(plan: bytes) -> str:
    return "\n".join(found.decode("latin1") for found in re.findall(rb"[\x20-\x7e\n\t]{30,}", plan))


def _operand_types(text: str) -> list[str]:
    """Types of the inputs of all matrix products; of several in one product the narrowest first."""
    types = dict(re.findall(r'tensor=\{[^\n]*?name="([^"]*)"[^\n]*?type=(\w+)', text))
    found = []
    for kind, body in re.findall(
        r"(fully_connected|runtime_fusion)=\{(.*?)(?:\}\n|backbone=\w+ \})", text, re.DOTALL
    ):
        inputs = re.search(r"input(?:_args)?=\{([^}]*)\}", body)
        names = re.findall(r'"([^"]*)"', inputs[1]) if inputs else []
        operands = {types.get(name, "?") for name in names}
        found += [narrow for narrow in ("fp8_e4m3", "int8") if narrow in operands] or [kind]
    return found


def test_a_gpu_without_fp8_is_refused_before_anything_is_built(fp8_bundle: Path, tmp_path: Path) -> None:
    done = run("compile", fp8_bundle, "--backend", "tensorrt-rtx", "--target", "sm86")
    assert done.exit_code == 2
    said = " ".join(done.stderr.split())
    assert (
        "sm86 has no fp8 arithmetic, which begins with compute capability 8.9; build with --quantize w8"
        in said
    )
    assert not (fp8_bundle / "engines").exists()


@pytest.mark.rehearsal
def test_int8_is_for_the_cpu(small_pipeline: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"int8 is for onnxruntime, in float32, and not in float16"):
        identify(str(small_pipeline), _options(Scheme.INT8, precision="float16"))
    events: list[Event] = []
    bundle = build(str(small_pipeline), tmp_path / "b", _options(Scheme.INT8), progress=events.append)
    assert bundle.contract.precision == "float32"
    assert "calibration" not in {event.component for event in events}
    done = run("compile", bundle.path, "--backend", "tensorrt-rtx", "--target", "sm89")
    assert done.exit_code == 2
    assert "quantised as int8, for onnxruntime" in done.stderr
    found = json.loads(run("compare", bundle.path, "--steps", "4", "--no-floor", "--json").stdout)
    assert found["direction"]["error"] < 0.25
    assert found["direction_floors"] == {}
