"""Building: whole or not at all, resumable, reproducible; bad input is refused before the first write."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from emag_export.bundle import MANIFEST, Bundle
from emag_export.errors import ExportError, InputError, ModelError
from emag_export.exporter.build import build
from emag_export.exporter.describe.identify import BuildPlan, finished_bundle, identify
from emag_export.exporter.describe.recipes import OPSETS
from emag_export.exporter.graph.export import export_component
from emag_export.exporter.source.find import find_source
from emag_export.exporter.staging import Staging, require_disk_space
from emag_export.kinds import Renorm, Variant
from emag_export.options import BuildOptions
from emag_export.progress import Event, Progress

EXPORT = "emag_export.exporter.build.export_component"
IDENTIFY = "emag_export.exporter.describe.identify"


def test_second_build_is_a_no_op(small_pipeline: Path, small_bundle: Path) -> None:
    phases: list[str] = []
    options = BuildOptions(variant=Variant.EMAG, emag_candidates=(1, 2))
    before = {path: path.stat().st_mtime_ns for path in small_bundle.rglob("*")}
    build(str(small_pipeline), small_bundle, options, progress=lambda event: phases.append(event.phase))
    assert phases == ["hash", "reuse"]
    assert before == {path: path.stat().st_mtime_ns for path in small_bundle.rglob("*")}


def test_interrupted_build_resumes_by_component(
    small_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the VAE, the next run exports the VAE only; nothing at the target until then."""
    real, out, exported = export_component, tmp_path / "b", []

    def dies(plan: BuildPlan, name: str, folder: Path, progress: Progress, *rest: Any) -> None:
        if name == "vae_decoder":
            raise KeyboardInterrupt
        exported.append(name)
        if name == "transformer":
            (folder / "model.onnx").write_bytes(b"stands for an hour of work")
        else:
            real(plan, name, folder, progress, *rest)

    monkeypatch.setattr(EXPORT, dies)
    options = BuildOptions(emag_candidates=(1,))
    with pytest.raises(KeyboardInterrupt):
        build(str(small_pipeline), out, options)
    assert not out.exists()
    assert exported == ["transformer", "text_encoder", "text_encoder_2"]

    monkeypatch.setattr(EXPORT, real)
    events: list[Event] = []
    build(str(small_pipeline), out, options, progress=events.append)
    assert [event.component for event in events if event.phase == "trace"] == ["vae_decoder"]
    assert Event(component="transformer", phase="reuse") in events
    assert [path.name for path in tmp_path.iterdir()] == ["b"], "the partial folder must be gone"


def test_part_damaged_between_runs_is_made_again(tmp_path: Path) -> None:
    staging = Staging(tmp_path / "b", "key")
    staging.part("x", lambda folder: (folder / "f").write_text("one"))
    (staging.path / "x" / "f").write_text("cut")
    staging.part("x", lambda folder: (folder / "f").write_text("two"))
    assert (staging.path / "x" / "f").read_text() == "two"


def test_other_options_discard_old_parts(tmp_path: Path) -> None:
    Staging(tmp_path / "b", "old").part("x", lambda folder: (folder / "f").write_text("old"))
    assert not Staging(tmp_path / "b", "new").finished("x")


def test_full_disk_says_what_to_do_and_keeps_finished_parts(
    small_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(EXPORT, full)
    with pytest.raises(ExportError, match=r"disk .* is full; free some space and run the same command again"):
        build(str(small_pipeline), tmp_path / "b", BuildOptions(emag_candidates=(1,)))
    assert not (tmp_path / "b").exists()


def test_too_little_disk_is_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="GB free, the bundle needs about"):
        require_disk_space(tmp_path / "b", 10**18)


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        ("no-such-model", {}, ModelError, "no known name"),
        ("tiny-sd3", {"emag_candidates": ()}, InputError, "no candidate block"),
        ("tiny-sd3", {"emag_candidates": (9, 10)}, InputError, "blocks 0 to 9"),
        ("tiny-sd3", {"precision": "int4"}, InputError, "choose fp32"),
        ("tiny-sd3", {"components": ("transformer", "vae")}, InputError, "no component 'vae'; it has"),
        ("tiny-sd3", {"components": ("vae_decoder",)}, InputError, "add it to `components`"),
        ("tiny-sd3", {"without": ("vae_decoder",)}, InputError, "pictures need 'vae_decoder'"),
        ("tiny-sd3", {"max_sequence_length": 513}, InputError, "takes 1 to 512 tokens"),
        ("tiny-sd3", {"weights_seed": 0}, ModelError, "need a known configuration: sd3"),
    ],
)
def test_bad_options_change_nothing_on_disk(
    model: str, options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        build(model, tmp_path / "b", BuildOptions(**options))
    assert list(tmp_path.iterdir()) == []


def test_folder_that_is_no_pipeline(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no model_index\.json"):
        find_source(str(tmp_path))


def test_other_architecture_is_refused(small_pipeline: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(small_pipeline, tmp_path / "other")
    config = copy / "transformer" / "config.json"
    config.write_text(config.read_text().replace("SD3Transformer2DModel", "FluxTransformer2DModel"))
    with pytest.raises(ModelError, match="FluxTransformer2DModel; only SD3Transformer2DModel"):
        find_source(str(copy))
    index = copy / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusion3Pipeline", "SanaPipeline"))
    with pytest.raises(ModelError, match="is a SanaPipeline"):
        find_source(str(copy))


def test_incomplete_pipeline_is_refused(small_pipeline: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(small_pipeline, tmp_path / "incomplete")
    (copy / "vae" / "config.json").unlink()
    with pytest.raises(ModelError, match=r"vae/config\.json is missing; .* save or download it again"):
        build(str(copy), tmp_path / "b", BuildOptions(emag_candidates=(1,)))


def test_key_follows_what_decides_the_content(
    small_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every option, the source's bytes, and the versions of what traces."""
    base = BuildOptions(emag_candidates=(1,))

    def key(options: BuildOptions = base, model: Path = small_pipeline) -> str:
        return identify(str(model), options).key

    assert key() == key(replace(base, precision="fp32")), "spelt otherwise, the same precision"
    keys = {
        key(),
        key(replace(base, variant=Variant.EMAG)),
        key(replace(base, renorm=Renorm.NONE)),
        key(replace(base, emag_candidates=(2,))),
        key(replace(base, precision="float16")),
    }
    copy = shutil.copytree(small_pipeline, tmp_path / "copy")
    keys.add(key(model=copy))  # named otherwise
    (copy / "scheduler" / "scheduler_config.json").write_text("{}")
    keys.add(key(model=copy))
    monkeypatch.setattr(f"{IDENTIFY}.version", lambda name: "0")
    keys.add(key())
    monkeypatch.setattr(f"{IDENTIFY}.OPSETS", {"float32": OPSETS["float32"] + 1})
    keys.add(key())
    assert len(keys) == 9


def test_damaged_bundle_is_not_finished(small_bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(small_bundle, tmp_path / "b")
    key = Bundle(copy).key
    assert finished_bundle(copy, key) is not None
    assert finished_bundle(copy, "another") is None
    assert finished_bundle(tmp_path / "nothing", key) is None
    (copy / "model_index.json").write_text("{}")
    assert finished_bundle(copy, key) is None
    (copy / MANIFEST).write_text("cut")
    assert finished_bundle(copy, key) is None


def test_truncated_weights_are_named(small_pipeline: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(small_pipeline, tmp_path / "cut")
    weights = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="is damaged: it has no safetensors header"):
        build(str(copy), tmp_path / "b", BuildOptions(emag_candidates=(1,)))
    assert not (tmp_path / "b").exists()


def test_offline_hub_model_explains_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="not in the local cache and the hub cannot be reached"):
        find_source("sd3")


def test_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "b"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    with pytest.raises(InputError, match=r"not empty.*`overwrite`"):
        build("tiny-sd3", out, BuildOptions())
    assert [path.name for path in tmp_path.rglob("*")] == ["b", "precious.txt"]


def test_bundle_names_no_local_path(small_bundle: Path) -> None:
    """Graphs must not tell where they were made; the manifest names the model as the user did."""
    here = str(Path(__file__).parent.parent).encode()
    for path in small_bundle.rglob("*"):
        if path.is_file() and path.name != MANIFEST:
            content = path.read_bytes()
            assert here not in content, path
            assert b"site-packages" not in content, path


def test_manifest_describes_every_graph(small_bundle: Path) -> None:
    bundle = Bundle(small_bundle)
    assert bundle.components == ["transformer", "text_encoder", "text_encoder_2", "vae_decoder"]
    assert bundle.contract.variant == Variant.EMAG
    assert bundle.contract.blocks == (1, 2)
    manifest = json.loads((small_bundle / MANIFEST).read_text())
    assert set(manifest["files"]) == {
        path.relative_to(small_bundle).as_posix()
        for path in small_bundle.rglob("*")
        if path.is_file() and path.name != MANIFEST
    }
