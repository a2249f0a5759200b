"""Real engines of real graphs, built without a GPU: TensorRT-RTX compiles ahead of time for named targets."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper

from emag_export.bundle import Bundle
from emag_export.cli.main import main
from emag_export.contract import GraphSpec, TensorSpec
from emag_export.engines.tensorrt.build import EngineBuild, plan_engine_build
from emag_export.engines.tensorrt.builder import build_plan
from emag_export.engines.tensorrt.flavour import flavour_of
from emag_export.engines.tensorrt.options import EngineOptions, SizeRange
from emag_export.engines.tensorrt.store import engine_folders
from emag_export.errors import EngineError
from emag_export.kinds import Variant
from emag_export.progress import Event
from tests.bundles import TinyBundles

RTX = flavour_of("tensorrt-rtx")
BLACKWELL_AND_ADA = ("sm89", "sm120")

SAME_BUNDLE: dict[str, Callable[[Bundle], list[str]]] = {
    "build": lambda bundle: ["--model", "tiny-sd3", "-o", str(bundle.path)],
    "compile": lambda bundle: [str(bundle.path)],
}
"""What each of the two commands that compile engines is told of a bundle that is there."""


def only(build: EngineBuild, component: str) -> EngineBuild:
    """A build of one component, to save time."""
    return replace(build, parts=tuple(part for part in build.parts if part.component == component))


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Bundle:
    shutil.copytree(tiny_bundle, tmp_path / "bundle")
    return Bundle(tmp_path / "bundle")


@pytest.mark.parametrize(
    ("variant", "precision", "targets"),
    [
        (Variant.EMAG_Q, "float32", BLACKWELL_AND_ADA),
        pytest.param(Variant.EMAG, "float16", ("sm89",), marks=pytest.mark.rehearsal),
        pytest.param(Variant.EMAG_Q, "float16", ("sm89",), marks=pytest.mark.rehearsal),
        pytest.param(Variant.EMAG_Q, "float16", ("sm120",), marks=pytest.mark.rehearsal),
        pytest.param(Variant.EMAG, "float32", BLACKWELL_AND_ADA, marks=pytest.mark.rehearsal),
        pytest.param(Variant.EMAG, "float16", BLACKWELL_AND_ADA, marks=pytest.mark.rehearsal),
    ],
)
def test_every_component_of_tiny_sd3_becomes_an_engine(
    tiny_bundles: TinyBundles, tmp_path: Path, variant: Variant, precision: str, targets: tuple[str, ...]
) -> None:
    shutil.copytree(tiny_bundles(variant, precision), tmp_path / "bundle")
    bundle = Bundle(tmp_path / "bundle")
    events: list[Event] = []
    build = plan_engine_build(bundle, RTX, EngineOptions(targets=targets))
    records = build.run(events.append)

    assert list(records) == bundle.components == list(build.missing)
    for component in bundle.components:
        phases = [event.phase for event in events if event.component == component]
        assert phases[0] == "compile"
        assert {"building engine", "optimizing graph"} <= set(phases)
    assert all(event.total is not None and event.done <= event.total for event in events)
    (folder,) = engine_folders(bundle)
    assert folder.name == f"tensorrt-rtx-{RTX.version()}-{'+'.join(targets)}"
    weights = sum(path.stat().st_size for path in (bundle.path / "transformer").glob("model.onnx*"))
    # The builder pads and may fold: its weights are those of the graph to a few per cent.
    assert records["transformer"].memory["weights"] == pytest.approx(weights, rel=0.15)
    for component, record in records.items():
        assert record.precision == precision
        assert record.memory["scratch"] > 0, component
        assert (
            build.folder.plan(bundle, component)[0].stat().st_size == record.bytes > record.memory["weights"]
        )

    again = plan_engine_build(bundle, RTX, EngineOptions(targets=targets))
    assert again.missing == ()


def test_the_second_build_is_a_hit_and_any_other_option_is_not(bundle: Bundle) -> None:
    options = EngineOptions(targets=("sm89",), max_images=2)
    only(plan_engine_build(bundle, RTX, options), "text_encoder").run()
    assert "text_encoder" not in plan_engine_build(bundle, RTX, options).missing
    for other in (
        EngineOptions(targets=("sm89",), max_images=3),
        EngineOptions(targets=("sm89",), max_images=2, tf32=False),
        EngineOptions(targets=("sm89",), max_images=2, height_range=SizeRange(min=64, opt=64, max=64)),
        EngineOptions(targets=("sm89",), max_images=2, optimization_level=1),
        EngineOptions(targets=("sm86",), max_images=2),
    ):
        assert "text_encoder" in plan_engine_build(bundle, RTX, other).missing


def test_a_single_size_gives_a_static_engine_of_less_memory(bundle: Bundle) -> None:
    def scratch(options: EngineOptions) -> int:
        build = only(plan_engine_build(bundle, RTX, options), "vae_decoder")
        return build.run()["vae_decoder"].memory["scratch"]

    one = SizeRange.parse("64")
    assert scratch(EngineOptions(targets=("sm89",), height_range=one, width_range=one)) < scratch(
        EngineOptions(targets=("sm89",))
    )


def _unary(path: Path, operator: str, domain: str = "") -> GraphSpec:
    """A graph of one operator on a vector of four."""
    node = helper.make_node(operator, ["x"], ["y"], name="the_node", domain=domain)
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy"]
    graph = helper.make_graph([node], "g", info[:1], info[1:])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("unknown.domain", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    x, y = (TensorSpec(name=name, dtype="float32", dims=(4,)) for name in "xy")
    return GraphSpec(name="g", inputs=(x,), outputs=(y,))


def test_an_unknown_operator_is_named_with_its_node_and_file(tmp_path: Path) -> None:
    spec = _unary(tmp_path / "g.onnx", "Bogus", "unknown.domain")
    with pytest.raises(EngineError, match=r"(?s)g\.onnx.*the_node.*polygraphy inspect"):
        build_plan(tmp_path / "g.onnx", spec, ({},), RTX, EngineOptions(targets=("sm89",)))


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    spec = _unary(tmp_path / "g.onnx", "Exp")
    (tmp_path / "g.onnx").write_bytes(b"not a graph")
    with pytest.raises(EngineError, match=r"cannot parse .*g\.onnx"):
        build_plan(tmp_path / "g.onnx", spec, ({},), RTX, EngineOptions(targets=("sm89",)))


def test_too_little_workspace_names_the_parameter(bundle: Bundle) -> None:
    with pytest.raises(EngineError, match="raise `workspace`"):
        build = plan_engine_build(bundle, RTX, EngineOptions(targets=("sm89",), workspace=1))
        only(build, "vae_decoder").run()


def test_ctrl_c_stops_the_build_and_leaves_no_plan(bundle: Bundle) -> None:
    command = [
        *(sys.executable, "-m", "emag_export.cli.main", "compile", str(bundle.path)),
        *("--backend", "tensorrt-rtx", "--target", "sm89"),
    ]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | {"COLUMNS": "200"}
    ) as run:
        assert run.stderr is not None
        for line in run.stderr:
            if "transformer: engine: compile" in line:
                break
        time.sleep(1.0)  # well inside the build of the denoiser, which takes five times as long
        run.send_signal(signal.SIGINT)
        rest = run.stderr.read()
    assert run.returncode == 130, rest
    assert "interrupted" in rest
    assert not list(bundle.path.glob("engines/*/*"))
    assert plan_engine_build(bundle, RTX, EngineOptions(targets=("sm89",))).missing


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--backend", "tensorrt-rtx", "--target", "sm90"], 2, "--backend tensorrt with --target current"),
        (["--backend", "tensorrt-rtx", "--target", "sm89", "--target", "current"], 2, "cannot be combined"),
        (["--backend", "tensorrt-rtx"], 6, "name the GPU to build for with --target"),
        (["--backend", "tensorrt"], 7, "pip install tensorrt"),
        (["--backend", "tensorrt", "--target", "sm89"], 2, "use --backend tensorrt-rtx"),
        (["--backend", "tensorrt-rtx", "--target", "sm89", "--refittable"], 2, "--target current"),
        (["--backend", "tensorrt-rtx", "--target", "sm89", "--version-compatible"], 2, "takes no"),
        (["--backend", "tensorrt-rtx", "--target", "sm89", "--timing-cache"], 2, "takes no --timing-cache"),
        (
            ["--backend", "tensorrt-rtx", "--target", "sm89", "--height-range", "9"],
            2,
            "--height-range 9 is no multiple of 8; take 8",
        ),
        (["--backend", "tensorrt-rtx", "--target", "sm89", "--width-range", "8:64:4096"], 2, "covers: 192"),
        (["--backend", "tensorrt-rtx", "--target", "sm89", "--width-range", "64:32"], 2, "no range of sizes"),
        (["--target", "sm89"], 2, "--backend"),
    ],
)
@pytest.mark.parametrize("command", ["build", "compile"])
@pytest.mark.filterwarnings("ignore:CUDA initialization")
def test_bad_options_end_in_one_sentence(
    bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    arguments: list[str],
    code: int,
    says: str,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = CliRunner().invoke(main, [command, *SAME_BUNDLE[command](bundle), *arguments])
    assert (result.exit_code, says in result.output) == (code, True), result.output
    assert not (bundle.path / "engines").exists()


def test_build_compile_inspect_and_generate_from_the_command_line(bundle: Bundle, tmp_path: Path) -> None:
    run = CliRunner().invoke
    engine = ["--backend", "tensorrt-rtx"]
    built = run(
        main,
        ["build", "--model", "tiny-sd3", "-o", str(bundle.path), *engine, "--target", "sm89", "--json"],
    )
    assert built.exit_code == 0, built.output
    assert json.loads(built.stdout)["engines"]["built"] == bundle.components
    again = run(main, ["compile", str(bundle.path), *engine, "--target", "sm89", "--json"])
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout) == {**json.loads(built.stdout)["engines"], "built": []}

    shown = run(main, ["inspect", str(bundle.path), "--engine"])
    assert shown.exit_code == 0
    assert "rows 1…3…12" in " ".join(shown.stdout.split())
    assert "every plan matches" in shown.stdout
    (report,) = json.loads(run(main, ["inspect", str(bundle.path), "--engine", "--json"]).stdout)
    assert report["plans"]["transformer"]["memory"].keys() == {"scratch", "activation", "weights"}
    assert report["targets"] == ["sm89"]

    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr("torch.cuda.is_available", lambda: False)
        made = run(
            main,
            [
                "generate",
                str(bundle.path),
                *engine,
                "--prompt",
                "a red circle",
                "-o",
                str(tmp_path / "a.png"),
            ],
        )
    assert made.exit_code == 6
    assert "needs an NVIDIA GPU" in made.output
    assert not (tmp_path / "a.png").exists()
