"""``emag-export build --model …`` with nothing else: precision, folder, engines, and what it says first."""

import hashlib
import json
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import torch
from click.testing import CliRunner

from emag_export.bundle import DENOISER, Bundle, file_records
from emag_export.cli import build as build_command
from emag_export.cli import compile_options
from emag_export.cli.demo import EMBEDDED
from emag_export.cli.main import main
from emag_export.engines.tensorrt import detect
from emag_export.engines.tensorrt.flavour import FLAVOURS, Flavour
from emag_export.engines.tensorrt.options import EngineOptions
from emag_export.errors import EngineError, InputError
from emag_export.exporter import staging
from emag_export.exporter.build import build
from emag_export.exporter.describe.identify import identify
from emag_export.exporter.graph import export as export_module
from emag_export.exporter.resources import needs_of, require_memory
from emag_export.exporter.source.find import find_source
from emag_export.families import KNOWN_MODELS
from emag_export.hashing import hash_file
from emag_export.kinds import Variant
from emag_export.options import BuildOptions
from tests.bundles import TinyBundles


@pytest.mark.parametrize("name", [name for name in KNOWN_MODELS if name not in EMBEDDED])
def test_published_models_are_built_in_half_precision(name: str) -> None:
    """In the one that the model was trained in."""
    plan = identify(name, BuildOptions(weights_seed=0))
    bfloat16 = plan.source.family.name in ("flux", "z_image", "qwen_image")
    assert plan.contract.precision == ("bfloat16" if bfloat16 else "float16")
    assert identify(name, BuildOptions(weights_seed=0, precision="float32")).contract.precision == "float32"


def test_embedded_models_and_the_measuring_one_are_built_in_float32() -> None:
    for name in EMBEDDED:
        assert identify(name, BuildOptions()).contract.precision == "float32"
    assert identify("sd3-narrow", BuildOptions(weights_seed=0)).contract.precision == "float32"


@pytest.mark.parametrize(
    ("dtype", "wanted"), [("float32", "float32"), ("float16", "float16"), ("bfloat16", "float16")]
)
def test_any_other_model_keeps_the_precision_it_is_stored_in(
    small_pipeline: Path, tmp_path: Path, dtype: str, wanted: str
) -> None:
    from safetensors.torch import load_file, save_file

    copy = tmp_path / "model"
    copy.mkdir()
    for path in small_pipeline.iterdir():
        if path.name != "transformer":
            (copy / path.name).symlink_to(path)
    (copy / "transformer").mkdir()
    (weights,) = (small_pipeline / "transformer").glob("*.safetensors")
    tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in load_file(weights).items()}
    save_file(tensors, copy / "transformer" / weights.name)
    (copy / "transformer" / "config.json").symlink_to(small_pipeline / "transformer" / "config.json")
    assert find_source(str(copy)).precision() == wanted


def test_what_it_says_before_it_begins(tmp_path: Path) -> None:
    """Of a random model, with the transformer alone; refused before the first write, so that it ends here."""
    (tmp_path / "sd3-emag-q").mkdir()
    (tmp_path / "sd3-emag-q" / "mine.txt").write_text("mine")
    command = [sys.executable, "-m", "emag_export.cli.main", "build", "--model", "sd3"]
    command += ["--weights", "random", "--components", DENOISER]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "sd3-emag-q is not empty" in done.stderr
    assert "needs about 4.4 GB of disk and 1.5 GB of memory for transformer" in done.stderr
    assert "ONNX only: this machine shows no NVIDIA GPU" in done.stderr
    assert "emag-export compile BUNDLE --backend tensorrt-rtx --target sm" in done.stderr
    assert 'pip install "emag-export[tensorrt-rtx]"' in done.stderr


# Measured with `python -m benchmarks.full_size`, own memory of the process at its highest.
@pytest.mark.parametrize(
    ("model", "component", "precision", "measured"),
    [("sd3", "transformer", "float16", 1.26e9), ("sd3.5-large", "transformer", "float16", 1.79e9)],
)
def test_memory_is_predicted_as_measured(model: str, component: str, precision: str, measured: float) -> None:
    options = BuildOptions(weights_seed=0, components=(component,), precision=precision)
    assert measured < needs_of(identify(model, options)).memory < 1.25 * measured


def test_disk_is_predicted_as_written(tiny_bundles: TinyBundles) -> None:
    for precision in ("float32", "float16"):
        bundle = Bundle(tiny_bundles(Variant.EMAG_Q, precision))
        written = sum(record.bytes for name, record in bundle.files.items() if name.endswith(".data"))
        needs = needs_of(identify("tiny-sd3", BuildOptions(precision=precision)))
        assert written < needs.disk < 2 * written, "graphs of a tiny model are not small beside its weights"
        assert needs_of(bundle_plan(precision), engines=True).disk == pytest.approx(2 * needs.disk, abs=1)


def bundle_plan(precision: str) -> Any:
    return identify("tiny-sd3", BuildOptions(precision=precision))


def test_a_machine_that_is_too_small_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = needs_of(identify("sd3.5-large", BuildOptions(weights_seed=0, components=(DENOISER,))))
    memory = type("Memory", (), {"total": 15 * 10**8, "available": 10**9})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(psutil, "swap_memory", lambda: type("Swap", (), {"total": 0}))
    with pytest.raises(InputError, match=r"transformer needs about 2\.0 GB .* has 1\.5 GB; take a half"):
        require_memory(needs)
    assert "1.0 GB of memory are free" in needs.describe()


def test_weights_are_gone_when_files_are_hashed(
    small_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules: list[weakref.ref[Any]] = []
    load, records = export_module._load, file_records

    def loaded(*arguments: Any) -> Any:
        module, sizes = load(*arguments)
        modules.append(weakref.ref(module))
        return module, sizes

    def hashed(root: Path, *hash_of: Any) -> Any:
        assert [ref() for ref in modules] == [None] * len(modules)
        return records(root, *hash_of)

    monkeypatch.setattr(export_module, "_load", loaded)
    monkeypatch.setattr(staging, "file_records", hashed)
    build(str(small_pipeline), tmp_path / "b", BuildOptions(emag_candidates=(1,), components=(DENOISER,)))
    assert len(modules) == 1


def test_hashing_maps_no_file(tmp_path: Path) -> None:
    """Pages of a mapped file count as memory of the process, as many as the file has: 200 MB here."""
    path = tmp_path / "large"
    path.write_bytes(b"x" * 200_000_000)
    code = (
        "from pathlib import Path; from emag_export.hashing import hash_file\n"
        f"print(hash_file(Path({str(path)!r})))\n"
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux's /proc")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    digest, peak = done.stdout.split("\n")[:2]
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest() == hash_file(path)
    assert int(peak.split()[1]) < 100_000  # kB


def test_without_a_gpu_nothing_is_loaded_to_find_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(detect, "_DEVICES", tmp_path)
    assert detect.usable_flavour() == (None, "this machine shows no NVIDIA GPU")
    (tmp_path / "nvidiactl").touch()
    assert not detect.has_nvidia_gpu(), "the driver alone is no GPU"
    (tmp_path / "nvidia0").touch()
    assert detect.has_nvidia_gpu()


def test_the_first_module_that_accepts_the_gpu_is_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(detect, "_DEVICES", tmp_path)
    refused: list[str] = []

    def probe(flavour: Any) -> None:
        if flavour.backend in refused:
            raise EngineError(f"{flavour.backend} refuses this GPU")

    monkeypatch.setattr("emag_export.engines.tensorrt.gpu.current_gpu", lambda flavour: None)
    monkeypatch.setattr("emag_export.engines.tensorrt.probe.probe", probe)
    # tensorrt cannot be installed everywhere, tensorrt-rtx is in the test environment.
    assert detect.usable_flavour() == (FLAVOURS["tensorrt-rtx"], "")
    refused.append("tensorrt-rtx")
    assert detect.usable_flavour() == (
        None,
        "tensorrt is not installed; tensorrt-rtx refuses this GPU",
    )
    monkeypatch.setattr(detect, "find_spec", lambda module: None)
    assert detect.usable_flavour()[1] == "tensorrt is not installed; tensorrt-rtx is not installed"


@pytest.mark.parametrize(
    ("model", "folder"),
    [("sd3.5-medium", "sd3.5-medium-emag"), ("owner/a.model", "a.model-emag"), ("b.safetensors", "b-emag")],
)
def test_the_folder_is_named_after_the_whole_model(
    model: str, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sd3.5-medium shall not be written to where sd3 is."""

    def stop(model: str, output: Path, options: Any, **how: bool) -> Bundle:
        raise InputError(f"into {output}.")

    monkeypatch.setattr(build_command, "_bundle", stop)
    done = CliRunner().invoke(main, ["build", "--model", model, "--variant", "emag", "--backend", "none"])
    assert f"into {folder}." in done.output


def test_engines_are_built_where_they_run_unless_refused(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[str] = []

    def record(bundle: Bundle, flavour: Flavour, options: EngineOptions) -> dict[str, Any]:
        built.append(flavour.backend)
        return {"folder": "engines", "bytes": 1, "built": []}

    monkeypatch.setattr(compile_options, "compile_engines", record)
    monkeypatch.setattr(build_command, "usable_flavour", lambda: (FLAVOURS["tensorrt-rtx"], ""))
    monkeypatch.setattr(compile_options, "current_gpu", lambda flavour, instead: None)
    command = ["build", "--model", "tiny-sd3", "-o", str(tiny_bundle)]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    assert "--backend tensorrt-rtx --prompt" in done.stdout
    assert CliRunner().invoke(main, [*command, "--backend", "none"]).exit_code == 0
    assert built == ["tensorrt-rtx"]
    found = json.loads(CliRunner().invoke(main, [*command, "--backend", "none", "--json"]).stdout)
    assert "engines" not in found
