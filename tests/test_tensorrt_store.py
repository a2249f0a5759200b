"""Plans are found by their key, checked by their hash, and refused with the command that rebuilds them."""

import json
import shlex
import shutil
from pathlib import Path

import pytest

from emag_export.bundle import Bundle
from emag_export.cli.build import build_options_of, command
from emag_export.cli.options import opener_of
from emag_export.engines.tensorrt.build import plan_engine_build, rebuild_command
from emag_export.engines.tensorrt.builder import BuiltPlan
from emag_export.engines.tensorrt.flavour import CURRENT, FLAVOURS, Flavour, flavour_of
from emag_export.engines.tensorrt.gpu import Gpu, current_gpu, require_memory
from emag_export.engines.tensorrt.open import find_engine_folder
from emag_export.engines.tensorrt.options import EngineOptions, SizeRange
from emag_export.engines.tensorrt.store import EngineFolder, EngineHeader
from emag_export.engines.tensorrt.workspace import Workspace
from emag_export.errors import BundleError, EngineError, InputError, MissingDependencyError
from emag_export.exporter.describe.identify import identify
from tests.bundles import silent

RTX = flavour_of("tensorrt-rtx")
ADA = Gpu(name="NVIDIA RTX 4090", capability=(8, 9), total=24 << 30, free=20 << 30)
OPTIONS = EngineOptions(targets=("sm89",))


@pytest.fixture
def bundle(small_bundle: Path, tmp_path: Path) -> Bundle:
    shutil.copytree(small_bundle, tmp_path / "bundle")
    return Bundle(tmp_path / "bundle")


@pytest.fixture
def stored(bundle: Bundle) -> EngineFolder:
    """A folder with a plan of every component; what is in a plan does not matter to the store."""
    build = plan_engine_build(bundle, RTX, OPTIONS)
    header = EngineHeader(backend="tensorrt-rtx", version=RTX.version(), targets=("sm89",), device=None)
    for part in build.parts:
        plan = BuiltPlan(data=part.component.encode(), memory={"weights": 1}, warnings=(), seconds=0.1)
        build.folder.save(
            part.component,
            plan,
            key=part.key,
            header=header,
            precision="float32",
            profiles=part.profiles,
            options=OPTIONS,
        )
    return build.folder


def test_a_stored_plan_is_found_for_a_gpu_of_its_target(bundle: Bundle, stored: EngineFolder) -> None:
    found = find_engine_folder(bundle, RTX, ADA)
    assert found.path == stored.path
    for component in bundle.components:
        path, record = found.plan(bundle, component)
        assert path.read_bytes() == component.encode()
        assert record.options == OPTIONS


@pytest.mark.parametrize(
    ("name", "version", "gpu"),
    [
        ("tensorrt-rtx", None, Gpu(name="H100", capability=(9, 0), total=1, free=1)),
        ("tensorrt-rtx", "1.0.0", ADA),
    ],
)
def test_a_plan_of_another_gpu_or_version_is_not_taken(
    bundle: Bundle,
    stored: EngineFolder,
    name: str,
    version: str | None,
    gpu: Gpu,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if version is not None:
        monkeypatch.setattr(Flavour, "version", lambda self: version)
    with pytest.raises(
        EngineError, match=r"has no engines for .* It has tensorrt-rtx-.*-sm89\. Build them: emag"
    ):
        find_engine_folder(bundle, flavour_of(name), gpu)


def test_an_altered_plan_is_refused_and_rebuilt(bundle: Bundle, stored: EngineFolder) -> None:
    (stored.path / "transformer.plan").write_bytes(b"TRANSFORMER")
    with pytest.raises(EngineError, match=r"SHA-256.*rebuild: emag-export build .*--target sm89"):
        stored.plan(bundle, "transformer")
    assert plan_engine_build(bundle, RTX, OPTIONS).missing == ("transformer",)


def test_a_missing_plan_is_refused(bundle: Bundle, stored: EngineFolder) -> None:
    (stored.path / "transformer.plan").unlink()
    with pytest.raises(EngineError, match=r"transformer\.plan is missing"):
        stored.plan(bundle, "transformer")


def test_a_plan_of_another_graph_is_refused(bundle: Bundle, stored: EngineFolder) -> None:
    manifest = json.loads((bundle.path / "bundle.json").read_text())
    manifest["files"]["transformer/model.onnx"]["sha256"] = "0" * 64
    (bundle.path / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(EngineError, match="built from another graph"):
        stored.plan(Bundle(bundle.path), "transformer")


@pytest.mark.parametrize("field", ["options", "profiles"])
def test_an_edited_record_is_refused(bundle: Bundle, stored: EngineFolder, field: str) -> None:
    path = stored.path / "engine.json"
    data = json.loads(path.read_text())
    plan = data["plans"]["transformer"]
    if field == "options":
        plan["options"]["max_images"] = 99
    else:
        plan["profiles"][0]["rows"]["max"] = 99
    path.write_text(json.dumps(data))
    with pytest.raises(EngineError, match="its record was edited"):
        stored.plan(bundle, "transformer")


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"format_version": 99}', '{"format_version": 1, "plans": {"a": 1}}']
)
def test_a_damaged_record_is_refused_and_rebuilt(bundle: Bundle, stored: EngineFolder, text: str) -> None:
    (stored.path / "engine.json").write_text(text)
    with pytest.raises(BundleError, match=r"engine\.json (is|has|cannot) .* rebuild: emag-export build"):
        stored.plan(bundle, "transformer")
    assert plan_engine_build(bundle, RTX, OPTIONS).missing == tuple(bundle.components)


def test_a_weight_budget_needs_plans_that_stream_weights(
    bundle: Bundle, stored: EngineFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emag_export.engines.tensorrt.open.current_gpu", lambda flavour: ADA)
    monkeypatch.setattr(Workspace, "__init__", lambda self, device: None)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    options = {"backend": "tensorrt-rtx", "device": "", "threads": 0, "provider": None, "cuda_graphs": True}
    wanted = r"transformer\.plan keeps all .* --weight-budget, .* with --weight-streaming: emag-export build"
    with pytest.raises(InputError, match=wanted):
        opener_of(bundle, {**options, "weight_budget": 1024})(bundle, "transformer")
    given: list[object] = []
    monkeypatch.setattr(
        "emag_export.engines.registry.open_tensorrt",
        lambda flavour, cuda_graphs, weight_budget: lambda bundle, component: given.append(weight_budget),
    )
    for budget in (1024, None):
        opener_of(bundle, {**options, "weight_budget": budget})(bundle, "transformer")
    assert given == [1 << 30, None], "MiB on the command line, bytes below"
    with pytest.raises(InputError, match=r"--weight-budget is for TensorRT, torch keeps all weights"):
        opener_of(bundle, {**options, "backend": "torch", "weight_budget": 0})


def test_a_bundle_with_engines_is_still_whole(bundle: Bundle, stored: EngineFolder) -> None:
    bundle.check()


def test_the_rebuild_command_builds_this_bundle(bundle: Bundle) -> None:
    """The command line finds the bundle by it, so the key is the same, and builds for the same targets."""
    program, name, *words = shlex.split(rebuild_command(bundle, "tensorrt-rtx", ("sm89", "sm120")))
    assert (program, name) == ("emag-export", "build")
    options = command.make_context("build", words).params
    plan = identify(options["model"], build_options_of(options), silent)
    assert plan.key == bundle.key
    assert plan.arguments == tuple(bundle.arguments)
    assert (options["backend"], options["targets"]) == ("tensorrt-rtx", ("sm89", "sm120"))
    assert options["output"] == bundle.path


def test_the_rebuild_command_holds_what_only_the_manifest_knows(bundle: Bundle) -> None:
    words = ["--model", "sd3", "--variant", "emag", "--weights", "random", "--seed", "3", "--no-t5"]
    manifest = json.loads((bundle.path / "bundle.json").read_text())
    manifest["arguments"] = [*words, "--lora", "my style.safetensors:0.5"]
    (bundle.path / "bundle.json").write_text(json.dumps(manifest))
    assert rebuild_command(Bundle(bundle.path), "tensorrt-rtx") == (
        f"emag-export build {shlex.join(words)} --lora 'my style.safetensors:0.5' "
        f"--backend tensorrt-rtx --target current -o {bundle.path}"
    )


@pytest.mark.parametrize("text", ["", "a", "1:2", "3:2:1", "0", "1:2:3:4", "-8"])
def test_bad_ranges(text: str) -> None:
    with pytest.raises(InputError, match="write 1024, or 512:1024:1536"):
        SizeRange.parse(text)


def test_too_little_device_memory_names_what_helps() -> None:
    with pytest.raises(EngineError, match=r"needs about 30\.0 GB .* 21\.5 GB free; lower --max-images"):
        require_memory(ADA, 30 * 10**9, "building transformer")
    require_memory(ADA, 20 * 10**9, "building transformer")


def test_missing_and_outdated_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingDependencyError, match="pip install tensorrt"):
        FLAVOURS["tensorrt"].load()
    monkeypatch.setattr("tensorrt_rtx.__version__", "1.3.9")
    with pytest.raises(EngineError, match=r"1\.3\.9 is too old.*1\.4 or newer.*pip install tensorrt-rtx"):
        RTX.load()


@pytest.mark.parametrize("backend", list(FLAVOURS))
def test_without_a_gpu_the_reason_is_given(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(EngineError, match="needs an NVIDIA GPU and PyTorch sees none"):
        current_gpu(flavour_of(backend))


def test_unknown_backend() -> None:
    with pytest.raises(InputError, match="choose tensorrt, tensorrt-rtx"):
        flavour_of("openvino")


def test_current_needs_a_gpu_before_anything_is_built(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(EngineError, match="name the GPU to build for with --target"):
        plan_engine_build(bundle, RTX, EngineOptions(targets=(CURRENT,)))
    assert not (bundle.path / "engines").exists()
