"""The Triton repository: what is in it, and its logic with overlapping requests, without Triton."""

import re
import shutil
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from emag_export.bundle import DENOISER, MANIFEST, Bundle
from emag_export.cli.main import main
from emag_export.engines.config import EngineConfig
from emag_export.errors import BundleError, CancelledError, EngineError, InputError
from emag_export.runtime.keywords import SAMPLING_KEYWORDS
from emag_export.runtime.pictures.metadata import read_picture_record
from emag_export.runtime.pipeline import Pipeline
from emag_export.serve.triton.backend import StepBackend
from emag_export.serve.triton.export import config_text, export_repository
from emag_export.serve.triton.fields import FIELDS, in_inputs
from emag_export.serve.triton.parameters import Limits, as_parameters, engine_of, limits_of

PROMPT = "a large red circle on a blue background"
# Of 255; measured: no pixel differs.
ONE_LEVEL = 1


def test_a_repository_holds_all_that_triton_needs(tiny_bundle: Path, tmp_path: Path) -> None:
    compiled = Path(shutil.copytree(tiny_bundle, tmp_path / "b"))
    (compiled / "engines" / "x").mkdir(parents=True)
    (compiled / "engines" / "x" / "transformer.plan").write_bytes(b"plan")
    done = CliRunner().invoke(
        main, ["export-triton", str(compiled), "-o", str(tmp_path / "repo"), "--threads", "2"]
    )
    assert done.exit_code == 0, done.output
    model = tmp_path / "repo" / "b"
    inside = Bundle(model / "1" / "bundle")
    inside.check()
    assert inside.key == Bundle(tiny_bundle).key
    assert (model / "1" / "bundle" / "engines" / "x" / "transformer.plan").read_bytes() == b"plan"
    graph = f"{DENOISER}/model.onnx"
    assert (model / "1" / "bundle" / graph).stat().st_ino == (compiled / graph).stat().st_ino, "a hard link"
    assert "class TritonPythonModel" in (model / "1" / "model.py").read_text()
    compile((tmp_path / "repo" / "client.py").read_text(), "client.py", "exec")
    readme = (tmp_path / "repo" / "README.md").read_text()
    assert "for nothing else" in readme and all(name in readme for name in FIELDS)
    assert 'key: "threads", value: { string_value: "2" }' in (model / "config.pbtxt").read_text()


def test_the_configuration_is_of_the_fields() -> None:
    text = config_text("tiny", EngineConfig(device="cuda:1", threads=3), 8, Limits(max_pixels=64))
    assert text.count("{") == text.count("}") and text.count("[") == text.count("]")
    assert re.findall(r'name: "([A-Z_]+)"', text) == ["PROMPT", *FIELDS, "PNG"]
    assert text.count("optional: true") == len(FIELDS)
    for line in (
        'name: "tiny"',
        'backend: "python"',
        "max_batch_size: 8",
        "iterative_sequence: true",
        "oldest {",
    ):
        assert line in text
    assert 'string_value: "cuda:1"' in text
    assert [field.keyword for field in FIELDS.values()] == list(SAMPLING_KEYWORDS)
    assert 'name: "GUIDANCE_INTERVAL", data_type: TYPE_FP32, dims: [ 2 ]' in text
    assert 'name: "EMAG_BLOCKS", data_type: TYPE_INT32, dims: [ -1 ]' in text


def test_the_model_opens_the_bundle_as_it_was_told() -> None:
    engine = EngineConfig(
        backend="tensorrt", device="cuda:1", threads=2, cuda_graphs=False, weight_budget=7, provider="x y"
    )
    limits = Limits(max_steps=5, max_pixels=64, max_prompt=9)
    told = as_parameters(engine, limits)
    assert (engine_of(told), limits_of(told)) == (engine, limits)
    assert "source" not in told
    with pytest.raises(InputError, match=r"parameter max_steps of config\.pbtxt is 'many'"):
        limits_of({**told, "max_steps": "many"})


def test_errors_speak_of_inputs() -> None:
    assert in_inputs("the `prompt` is empty; `steps` too, `foo`") == "the PROMPT is empty; STEPS too, foo"


def test_nothing_is_replaced_unasked(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle, output = Bundle(tiny_bundle), tmp_path / "repo"
    output.mkdir()
    (output / "precious").write_text("x")
    with pytest.raises(InputError, match="is not empty"):
        export_repository(bundle, output, EngineConfig())
    assert (output / "precious").exists()
    export_repository(bundle, output, EngineConfig(), overwrite=True)
    assert not (output / "precious").exists() and not list(tmp_path.glob(".*.partial"))
    with pytest.raises(InputError, match="`max_images` is 0"):
        export_repository(bundle, tmp_path / "other", EngineConfig(), images=0)


def test_an_output_that_would_cost_the_bundle_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "parent"
    copied = Path(shutil.copytree(tiny_bundle, folder / "b"))
    for output in (copied, folder, copied / "repo"):
        with pytest.raises(InputError, match="lie inside one another"):
            export_repository(Bundle(copied), output, EngineConfig(), overwrite=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        export_repository(Bundle(copied), tmp_path / "file", EngineConfig(), overwrite=True)
    Bundle(copied).check()


def test_a_damaged_bundle_is_not_exported(tiny_bundle: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(tiny_bundle, tmp_path / "b"))
    (damaged / "scheduler" / "scheduler_config.json").write_text("{}")
    with pytest.raises(BundleError, match=r"scheduler_config\.json"):
        export_repository(Bundle(damaged), tmp_path / "repo", EngineConfig())
    assert not (tmp_path / "repo").exists() and (damaged / MANIFEST).exists()


@pytest.fixture
def backend(tiny_bundle: Path) -> Any:
    made = StepBackend(tiny_bundle, EngineConfig(threads=1), images=3)
    yield made
    made.close()


def test_overlapping_requests_get_the_pictures_they_get_alone(
    backend: StepBackend, tiny_bundle: Path, tmp_path: Path
) -> None:
    wanted: dict[str, dict[str, Any]] = {
        "a": {"seed": 1, "steps": 9},
        "b": {"seed": 2, "steps": 3, "guidance": "cfg"},
        "c": {"seed": 3, "steps": 5, "guidance": "emag-only"},
        "d": {"seed": 4, "steps": 4, "guidance_scale": 2.0},
    }
    found: dict[str, bytes] = {}
    waiting = dict(wanted)
    while len(found) < len(wanted):
        if waiting:  # one more joins before every step
            key, keywords = next(iter(waiting.items()))
            backend.start(key, PROMPT, waiting.pop(key))
        backend.step()
        for key in wanted:
            if isinstance(png := backend.take(key), bytes):
                found[key] = png
    assert max(backend.calls) == 3, "they shared calls"
    with Pipeline.open(tiny_bundle, threads=1) as pipeline:
        for key, keywords in wanted.items():
            (alone,) = pipeline.generate(PROMPT, **keywords)
            ours = np.asarray(Image.open(BytesIO(found[key])).convert("RGB")).astype(int)
            assert np.abs(ours - np.asarray(alone)).max() <= ONE_LEVEL
    (tmp_path / "a.png").write_bytes(found["a"])
    assert read_picture_record(tmp_path / "a.png").request.steps == 9


def test_a_bad_request_and_one_that_leaves_harm_nobody(backend: StepBackend) -> None:
    backend.start("good", PROMPT, {"steps": 3})
    with pytest.raises(InputError, match="0 denoising steps"):
        backend.start("bad", PROMPT, {"steps": 0})
    backend.start("leaves", PROMPT, {"steps": 50})
    backend.step()
    backend.cancel("leaves")
    for _ in range(3):
        backend.step()
    assert isinstance(backend.take("good"), bytes) and "bad" not in backend
    assert isinstance(backend.take("leaves"), CancelledError) and "leaves" not in backend


def test_an_engine_that_fails_is_opened_again(backend: StepBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no memory")

    backend.start("a", PROMPT, {"steps": 2})
    monkeypatch.setattr(backend._scheduler.engine, "run", broken)
    backend.step()
    assert isinstance(backend.take("a"), EngineError)
    backend.start("b", PROMPT, {"steps": 1})
    backend.step()
    assert isinstance(backend.take("b"), bytes)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"steps": 2**31 - 1}, "`steps` is 2147483647; give at most 100"),
        ({"height": 4096, "width": 4096}, "16777216 pixels"),
        ({"negative_prompt": "x" * 4001}, "`negative_prompt` has 4001 characters"),
    ],
)
def test_nobody_takes_all_of_the_server(backend: StepBackend, given: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        backend.start("greedy", PROMPT, given)
    assert "greedy" not in backend


def test_a_decoder_that_fails_ends_one_picture(backend: StepBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be begun again and again if nobody were told."""

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no memory")

    backend.start("a", PROMPT, {"steps": 1})
    with monkeypatch.context() as patch:
        patch.setattr(backend._pipeline, "decode", broken)
        backend.step()
    assert isinstance(error := backend.take("a"), EngineError) and "no memory" in error.message
    backend.start("b", PROMPT, {"steps": 1})
    backend.step()
    assert isinstance(backend.take("b"), bytes)


def test_an_engine_that_does_not_open_again_is_tried_again(
    backend: StepBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise EngineError("no device")

    backend.start("a", PROMPT, {"steps": 2})
    with monkeypatch.context() as patch:
        patch.setattr(backend._scheduler.engine, "run", broken)
        patch.setattr(backend._pipeline, "reopen_denoiser", broken)
        backend.step()
        assert isinstance(backend.take("a"), EngineError)
        backend.start("b", PROMPT, {"steps": 1})
        backend.step()
        assert isinstance(backend.take("b"), EngineError)
    backend.start("c", PROMPT, {"steps": 1})
    backend.step()
    assert isinstance(backend.take("c"), bytes)


def test_pictures_nobody_asks_for_are_forgotten(backend: StepBackend) -> None:
    backend.start("left while drawn", PROMPT, {"steps": 50})
    backend.start("left at the end", PROMPT, {"steps": 2})
    backend.start("stays", PROMPT, {"steps": 12})
    for _ in range(12):
        backend.step()
        assert "stays" in backend
        found = backend.take("stays")
    assert isinstance(found, bytes)
    assert "left while drawn" not in backend and "left at the end" not in backend
    assert not backend._jobs and not backend._ends and backend._scheduler.live == 0


def test_requests_that_are_asked_for_in_turns_are_kept(backend: StepBackend) -> None:
    """As Triton does where every one has other inputs: they are not begun again."""
    keys = ["a", "b", "c"]
    for key in keys:
        backend.start(key, PROMPT, {"steps": 9})
    found = []
    for number in range(11):
        backend.step()
        found += [backend.take(keys[number % 3])]
    assert sum(isinstance(png, bytes) for png in found) == 3 and len(backend.calls) == 9
