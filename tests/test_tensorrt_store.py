"""Plans are found by their key, checked by their hash, and refused with the call that builds them again."""

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import emag_export
from emag_export.bundle import Bundle
from emag_export.cli.compile import command
from emag_export.cli.options import engine_config
from emag_export.cli.words import command_of
from emag_export.engines.config import EngineConfig
from emag_export.engines.registry import EngineOpener, open_backend
from emag_export.engines.tensorrt.build import compile_call, plan_engine_build
from emag_export.engines.tensorrt.builder import BuiltPlan
from emag_export.engines.tensorrt.flavour import CURRENT, FLAVOURS, Flavour, flavour_of
from emag_export.engines.tensorrt.gpu import Gpu, current_gpu, require_memory
from emag_export.engines.tensorrt.open import find_engine_folder
from emag_export.engines.tensorrt.options import EngineOptions, SizeRange
from emag_export.engines.tensorrt.store import EngineFolder, EngineHeader
from emag_export.engines.tensorrt.workspace import Workspace
from emag_export.errors import BundleError, Call, EngineError, InputError, MissingDependencyError
from emag_export.progress import Event

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
    header = EngineHeader(backend="tensorrt-rtx", version=RTX.version(), targets=("sm89",), device=None)
    return store(bundle, header, OPTIONS)


def store(bundle: Bundle, header: EngineHeader, options: EngineOptions) -> EngineFolder:
    build = plan_engine_build(bundle, RTX, OPTIONS)
    for part in build.parts:
        plan = BuiltPlan(data=part.component.encode(), memory={"weights": 1}, warnings=(), seconds=0.1)
        build.folder.save(
            part.component,
            plan,
            key=part.key,
            header=header,
            precision="float32",
            profiles=part.profiles,
            options=options,
        )
    return build.folder


@pytest.fixture
def rebuild(bundle: Bundle) -> Call:
    """What mends every plan of ``stored``."""
    return compile_call(bundle, "tensorrt-rtx", ("sm89",))


def test_a_stored_plan_is_found_for_a_gpu_of_its_target(
    bundle: Bundle, stored: EngineFolder, rebuild: Call
) -> None:
    found = find_engine_folder(bundle, RTX, ADA)
    assert (found.path, found.rebuild) == (stored.path, rebuild)
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
    wanted = (
        r"has no engines for .* It has tensorrt-rtx-.*-sm89, and engines run with the version and on the "
    )
    wanted += r"GPU that they were built for\. Build them: emag_export\.compile\("
    with pytest.raises(EngineError, match=wanted) as caught:
        find_engine_folder(bundle, flavour_of(name), gpu)
    assert caught.value.remedy == compile_call(bundle, name)


A100 = Gpu(name="NVIDIA A100", capability=(8, 0), total=40 << 30, free=40 << 30)
T4 = Gpu(name="Tesla T4", capability=(7, 5), total=16 << 30, free=16 << 30)


@pytest.mark.parametrize(
    ("options", "version", "gpu", "found"),
    [
        ({}, "10.13.2", A100, True),
        ({}, "10.13.2.1", A100, False),
        ({}, "10.14.1", A100, False),
        ({"version_compatible": True}, "10.13.2.1", A100, True),
        ({"version_compatible": True}, "10.14.1", A100, True),
        ({"version_compatible": True}, "10.13.0", A100, False),
        ({"version_compatible": True}, "11.0.0", A100, False),
        ({"version_compatible": True}, "10.14.1", ADA, False),
        ({"hardware_compatible": True}, "10.13.2", ADA, True),
        ({"hardware_compatible": True}, "10.13.2", T4, False),
        ({"hardware_compatible": True}, "10.14.1", ADA, False),
        ({"version_compatible": True, "hardware_compatible": True}, "10.14.1", ADA, True),
    ],
)
def test_plans_that_were_built_to_run_elsewhere_too_are_taken_there(
    bundle: Bundle,
    options: dict[str, Any],
    version: str,
    gpu: Gpu,
    found: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    header = EngineHeader(backend="tensorrt", version="10.13.2", targets=(CURRENT,), device=A100.name)
    folder = store(bundle, header, EngineOptions(**options))
    monkeypatch.setattr(Flavour, "version", lambda self: version)
    if found:
        assert find_engine_folder(bundle, flavour_of("tensorrt"), gpu).path == folder.path
    else:
        with pytest.raises(EngineError, match="has no engines for tensorrt"):
            find_engine_folder(bundle, flavour_of("tensorrt"), gpu)


def test_an_altered_plan_is_refused_and_built_again(
    bundle: Bundle, stored: EngineFolder, rebuild: Call
) -> None:
    (stored.path / "transformer.plan").write_bytes(b"TRANSFORMER")
    with pytest.raises(EngineError, match=r"SHA-256.*; build it again: emag_export\.compile") as caught:
        stored.plan(bundle, "transformer")
    assert caught.value.remedy == rebuild
    assert plan_engine_build(bundle, RTX, OPTIONS).missing == ("transformer",)


def test_a_missing_plan_is_refused(bundle: Bundle, stored: EngineFolder) -> None:
    (stored.path / "transformer.plan").unlink()
    with pytest.raises(EngineError, match=r"transformer\.plan is missing"):
        stored.plan(bundle, "transformer")


def test_a_plan_of_another_graph_is_refused(bundle: Bundle, stored: EngineFolder, rebuild: Call) -> None:
    manifest = json.loads((bundle.path / "bundle.json").read_text())
    manifest["files"]["transformer/model.onnx"]["sha256"] = "0" * 64
    (bundle.path / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(EngineError, match="built from another graph") as caught:
        stored.plan(Bundle(bundle.path), "transformer")
    assert caught.value.remedy == rebuild


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
    "change",
    [
        lambda text: "",
        lambda text: "{}",
        lambda text: "[]",
        lambda text: text.replace('"format_version": 2', '"format_version": 99'),
        lambda text: text.replace('"format_version": 2', '"format_version": 1'),
        lambda text: '{"format_version": 2, "plans": {"a": 1}}',
    ],
    ids=["empty", "no version", "list", "newer", "older", "no plans"],
)
def test_a_damaged_record_is_refused_and_built_again(
    bundle: Bundle, stored: EngineFolder, rebuild: Call, change: Callable[[str], str]
) -> None:
    record = stored.path / "engine.json"
    record.write_text(change(record.read_text()))
    wanted = r"engine\.json (is|has|cannot) .* build the engines again: emag_export\.compile"
    with pytest.raises(BundleError, match=wanted) as caught:
        stored.plan(bundle, "transformer")
    assert caught.value.remedy == rebuild
    assert plan_engine_build(bundle, RTX, OPTIONS).missing == tuple(bundle.components)


def test_a_weight_budget_needs_plans_that_stream_weights(
    bundle: Bundle, stored: EngineFolder, rebuild: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emag_export.engines.tensorrt.open.current_gpu", lambda flavour: ADA)
    monkeypatch.setattr(Workspace, "__init__", lambda self, device: None)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)

    wanted = r"transformer\.plan keeps all .* leave out `weight_budget`, .* with `weight_streaming`"
    config = EngineConfig(backend="tensorrt-rtx", weight_budget=1024)
    with pytest.raises(InputError, match=wanted) as caught:
        open_backend(config, bundle)(bundle, "transformer")
    assert caught.value.remedy == rebuild


def test_a_weight_budget_is_given_in_mib_and_kept_in_bytes(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[str, bool, int | None]] = []

    def opened(flavour: Flavour, *, cuda_graphs: bool, weight_budget: int | None) -> EngineOpener:
        given.append((flavour.backend, cuda_graphs, weight_budget))
        return open_backend(EngineConfig(), bundle)

    monkeypatch.setattr("emag_export.engines.tensorrt.open.open_tensorrt", opened)
    words = {"backend": "tensorrt-rtx", "device": "", "threads": 0, "provider": None, "source": None}
    for budget in (1024, 0, None):
        open_backend(engine_config({**words, "cuda_graphs": False, "weight_budget": budget}), bundle)
    assert given == [("tensorrt-rtx", False, budget) for budget in (1 << 30, 0, None)]


@pytest.mark.parametrize("backend", list(FLAVOURS))
def test_a_gpu_by_number_is_refused(bundle: Bundle, backend: str) -> None:
    """Plans are opened on the current GPU; any other would be ignored in silence."""
    with pytest.raises(InputError, match=f"{backend} runs on the GPU that is current, not on cuda:1"):
        open_backend(EngineConfig(backend=backend, device="cuda:1"), bundle)


def test_a_bundle_with_engines_is_still_whole(bundle: Bundle, stored: EngineFolder) -> None:
    bundle.check()


def test_the_command_that_builds_again_finds_this_bundle_and_these_targets(bundle: Bundle) -> None:
    """The command line reads it: same folder, same backend, same GPUs, nothing else said."""
    program, name, *words = shlex.split(command_of(compile_call(bundle, "tensorrt-rtx", ("sm89", "sm120"))))
    assert (program, name) == ("emag-export", "compile")
    options = command.make_context(name, words).params
    usual = command.make_context(name, [str(bundle.path), "--backend", "tensorrt-rtx"]).params
    assert options.pop("targets") == ("sm89", "sm120")
    assert usual.pop("targets") == (CURRENT,)
    assert options == usual
    assert options["bundle"] == bundle.path


def test_the_call_that_builds_again_is_one_of_the_library(
    bundle: Bundle, stored: EngineFolder, rebuild: Call
) -> None:
    """It asks for the very plans that are there, so nothing is built."""
    before = {path: path.read_bytes() for path in stored.path.iterdir()}
    events: list[Event] = []
    assert emag_export.compile(**rebuild.arguments, progress=events.append) == stored.path
    assert {event.phase for event in events} == {"reuse"}
    assert {path: path.read_bytes() for path in stored.path.iterdir()} == before
    assert str(rebuild) == (
        f"emag_export.compile(bundle='{bundle.path}', backend='tensorrt-rtx', targets=('sm89',))"
    )


def test_this_machines_gpu_needs_no_target_in_the_call(bundle: Bundle) -> None:
    assert set(compile_call(bundle, "tensorrt").arguments) == {"bundle", "backend"}


@pytest.mark.parametrize("text", ["", "a", "1:2", "3:2:1", "0", "1:2:3:4", "-8"])
def test_bad_ranges(text: str) -> None:
    with pytest.raises(InputError, match="write 1024, or 512:1024:1536"):
        SizeRange.parse(text)


def test_too_little_device_memory_names_what_helps() -> None:
    with pytest.raises(EngineError, match=r"needs about 30\.0 GB .* 21\.5 GB free; lower `max_images`"):
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
    with pytest.raises(EngineError, match="name the GPU to build for with `targets`"):
        plan_engine_build(bundle, RTX, EngineOptions(targets=(CURRENT,)))
    assert not (bundle.path / "engines").exists()
