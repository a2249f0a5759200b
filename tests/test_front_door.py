"""``import emag_export`` and nothing else: what a program does with it, beside what the command line does."""

import ast
import importlib
import inspect
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import emag_export as emag
from emag_export.api import build_options, compile_options, default_folder
from emag_export.bundle import DENOISER, Bundle
from emag_export.cli.main import main
from emag_export.engines.observed import ObservedEngine
from emag_export.engines.protocol import Engine
from emag_export.engines.tensorrt.options import EngineOptions, SizeRange
from emag_export.errors import InputError
from emag_export.options import BuildOptions, Lora
from emag_export.progress import Event
from emag_export.runtime.pictures.metadata import read_picture_record
from emag_export.runtime.pictures.preview import enlarge, preview, preview_factors
from emag_export.runtime.pipeline import Pipeline
from tests.bundles import opener

PROMPT = "a large red circle on a blue background"
KEY = "emag-export"
"""Of the record among a picture's texts."""


@pytest.fixture(scope="module")
def pipeline(tiny_bundle: Path) -> Iterator[Pipeline]:
    with emag.Pipeline.open(tiny_bundle, threads=1) as opened:
        yield opened


def pixels(image: Image.Image) -> np.ndarray[Any, Any]:
    return np.asarray(image).astype(int)


def in_python(code: str, cwd: Path) -> str:
    """Output of a fresh interpreter, without the type checks of the tests."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False, cwd=cwd
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_is_free(tmp_path: Path) -> None:
    """Nothing that is heavy, no room of the package, and nothing is written."""
    code = "import sys; before = set(sys.modules); import emag_export; print(*set(sys.modules) - before)"
    loaded = set(in_python(code, tmp_path).split())
    assert {name for name in loaded if name.startswith("emag_export")} <= {
        "emag_export",
        "emag_export.version",
    }
    assert not loaded & {"torch", "numpy", "PIL", "click", "pydantic", "diffusers", "transformers", "onnx"}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["Bundle", "EmagError", "EngineConfig", "Event", "Lora", "build", "Variant"])
def test_names_that_need_no_torch_load_none(name: str, tmp_path: Path) -> None:
    code = f"import sys, emag_export; emag_export.{name}; print(*sys.modules)"
    assert not set(in_python(code, tmp_path).split()) & {"torch", "numpy", "diffusers", "onnxruntime"}


def test_every_public_name_is_there_and_every_name_that_is_there_is_public(tmp_path: Path) -> None:
    assert len(set(emag.__all__)) == len(emag.__all__)
    assert {*emag._HOMES, "__version__"} == set(emag.__all__)
    for name, home in emag._HOMES.items():
        defined = getattr(importlib.import_module(f"emag_export.{home}"), name)
        assert getattr(emag, name) is defined
        assert defined.__module__ == f"emag_export.{home}", "where it is defined, not where it passed by"
    assert set(emag.__all__) <= set(dir(emag))
    code = "import emag_export as e; print(*dir(e)); from emag_export import *; print(Pipeline.__name__)"
    listed, found = in_python(code, tmp_path).splitlines()
    assert set(emag.__all__) <= set(listed.split()), "before any of them was used"
    assert found == "Pipeline"


def test_type_checkers_see_the_same_names() -> None:
    """They read the imports under TYPE_CHECKING, Python the table of homes."""
    tree = ast.parse(inspect.getsource(emag))
    (guarded,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        alias.name: str(node.module).removeprefix("emag_export.")
        for node in guarded.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == emag._HOMES


@pytest.mark.parametrize("name", ["Pipelines", "BuildOptions", "_private", "torch"])
def test_other_names_are_no_attributes(name: str) -> None:
    with pytest.raises(AttributeError, match=f"module 'emag_export' has no attribute '{name}'"):
        emag.__getattr__(name)
    assert not hasattr(emag, name)


def test_a_picture_remembers_how_it_was_made(pipeline: Pipeline, tiny_bundle: Path, tmp_path: Path) -> None:
    """In memory, through PNG, and to the command line, which draws it again."""
    options: Any = {"guidance": "emag+apg", "guidance_scale": 5.0, "steps": 6, "height": 48, "emag_delta": 20}
    (picture,) = pipeline.generate(PROMPT, seed=3, negative_prompt="green", **options)
    assert isinstance(picture, Image.Image)
    assert (picture.mode, picture.size) == ("RGB", (64, 48))
    assert picture.info["Description"] == PROMPT
    assert picture.info["Software"] == f"emag-export {emag.__version__}"

    picture.save(str(tmp_path / "x.png"))
    record = read_picture_record(tmp_path / "x.png")
    assert json.loads(picture.info[KEY]) == json.loads(json.dumps(asdict(record)))
    request = record.request
    assert (request.prompt, request.negative_prompt, request.seed) == (PROMPT, "green", 3)
    assert (request.steps, request.height, request.width, request.windows.delta) == (6, 48, 64, 20)
    assert (request.guidance.name, request.guidance.scale, request.guidance.apg.scale) == ("emag+apg", 5, 5)
    assert (record.model, record.variant, record.precision) == ("tiny-sd3", emag.Variant.EMAG_Q, "float32")
    with Image.open(tmp_path / "x.png") as reread:
        assert (pixels(reread) == pixels(picture)).all()

    again = ["generate", str(tiny_bundle), "--like", str(tmp_path / "x.png"), "--threads", "1"]
    done = CliRunner().invoke(main, [*again, "-o", str(tmp_path / "y.png")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "y.png").read_bytes() == (tmp_path / "x.png").read_bytes()


def test_pictures_are_saved_as_pil_saves_them(pipeline: Pipeline, tmp_path: Path) -> None:
    """A Path, an open file, another format, somebody's own chunks: only PNGs get the record."""
    (picture,) = pipeline.generate(PROMPT, steps=1)
    picture.save(tmp_path / "a.png")
    with (tmp_path / "b").open("wb") as file:
        picture.save(file, format="png")
    picture.save(tmp_path / "c.PNG", compress_level=0)
    for name in ("a.png", "b", "c.PNG"):
        assert read_picture_record(tmp_path / name).request.prompt == PROMPT
    picture.save(tmp_path / "d.jpg", quality=90)
    with Image.open(tmp_path / "d.jpg") as jpeg:
        assert jpeg.format == "JPEG"
    small = picture.resize((8, 8))
    assert small.size == (8, 8)
    picture.save(tmp_path / "e.png", pnginfo=None)
    with pytest.raises(InputError, match="holds no emag-export parameters"):
        read_picture_record(tmp_path / "e.png")


def test_several_prompts_and_pictures_come_in_order(pipeline: Pipeline) -> None:
    """Batches change nothing but rounding: at most one of 255 levels."""
    prompts = [PROMPT, "a small green triangle on a white background"]
    pictures = pipeline.generate(prompts, images=2, seed=5, steps=3, batch_size=3)
    requests = [json.loads(picture.info[KEY])["request"] for picture in pictures]
    assert [(r["prompt"], r["seed"]) for r in requests] == [(p, s) for p in prompts for s in (5, 6)]
    (alone,) = pipeline.generate(prompts[1], seed=6, steps=3)
    assert np.abs(pixels(alone) - pixels(pictures[3])).max() <= 1
    assert np.abs(pixels(pictures[0]) - pixels(pictures[1])).max() > 20, "seeds matter"


def test_what_is_left_out_or_none_is_the_bundles_own(pipeline: Pipeline) -> None:
    (plain,) = pipeline.generate(PROMPT, steps=2)
    (none,) = pipeline.generate(PROMPT, steps=2, guidance=None, height=None, seed=None, emag_blocks=None)
    assert plain.info == none.info
    assert (pixels(plain) == pixels(none)).all()


def test_a_stream_shows_every_step_and_ends_with_the_pictures(pipeline: Pipeline) -> None:
    wanted = pipeline.generate(PROMPT, images=2, seed=1, steps=5)
    steps = list(pipeline.stream(PROMPT, images=2, seed=1, steps=5, previews=True))
    assert [(step.index, step.steps) for step in steps] == [(index, 5) for index in range(5)]
    for step in steps:
        assert len(step.previews) == 2
        assert all(isinstance(image, Image.Image) and image.size == (64, 64) for image in step.previews)
        assert step.latents.shape[0] == 2
        assert bool(step.images) == (step.index == 4)
    for got, expected in zip(steps[-1].images, wanted, strict=True):
        assert (pixels(got) == pixels(expected)).all()
        assert got.info == expected.info
    # The last step predicts the latents that it ends with, so its previews are of the finished pictures.
    last = preview(steps[-1].latents, preview_factors(pipeline.bundle))
    for small, shown in zip(last, steps[-1].previews, strict=True):
        assert np.abs(enlarge(small, 64, 64).astype(int) - pixels(shown)).max() <= 1
    assert all(step.previews == () for step in pipeline.stream(PROMPT, steps=2))


def test_a_stream_that_is_closed_runs_no_further(tiny_bundle: Path) -> None:
    """Nothing before the first ``next``, nothing after ``close``, and the pipeline is as good as new."""
    calls: list[str] = []

    def counting(bundle: Bundle, component: str) -> Engine:
        engine = opener(threads=1)(bundle, component)
        return ObservedEngine(engine, before=lambda feeds: calls.append(component))

    with Pipeline(Bundle(tiny_bundle), counting) as pipeline:
        (untouched,) = pipeline.generate(PROMPT, seed=2, steps=4)
        assert calls.count(DENOISER) == 4
        calls.clear()
        stream = pipeline.stream(PROMPT, seed=2, steps=4)
        assert calls == []
        assert [next(stream).index for _ in range(2)] == [0, 1]
        assert calls.count(DENOISER) == 2
        stream.close()
        assert list(stream) == []
        assert calls.count(DENOISER) == 2
        assert "vae_decoder" not in calls
        with closing(pipeline.stream(PROMPT, seed=9, steps=4)) as left:
            for _ in left:
                break
        assert calls.count(DENOISER) == 3
        (after,) = pipeline.generate(PROMPT, seed=2, steps=4)
    assert (pixels(after) == pixels(untouched)).all()


@pytest.mark.parametrize("kind", [str, Path, Bundle])
def test_a_bundle_is_taken_by_path_by_name_and_open(kind: type[Any], tiny_bundle: Path) -> None:
    for variant in ("emag-q", emag.Variant.EMAG_Q):
        with emag.Pipeline.open(kind(tiny_bundle), variant=variant, threads=1) as pipeline:
            assert pipeline.bundle.path == tiny_bundle
            assert pipeline.bundle.key == Bundle(tiny_bundle).key
    with pytest.raises(
        InputError, match="holds the variant emag-q, emag was asked for; build it: emag_export"
    ):
        emag.Pipeline.open(kind(tiny_bundle), variant="emag")


def test_texts_members_and_paths_mean_the_same(tmp_path: Path) -> None:
    typed = BuildOptions(
        variant=emag.Variant.EMAG,
        renorm=emag.Renorm.NONE,
        precision="float16",
        state_precision="float16",
        emag_candidates=(3, 4),
        without=("text_encoder_3",),
        encoders=Path("b"),
        loras=(Lora(path=Path("x")), Lora(path=Path("y"), scale=0.5), Lora(path=Path("z"), scale=2.0)),
    )
    loose = build_options(
        variant="emag",
        renorm="none",
        precision="fp16",
        state_precision="fp16",
        emag_candidates=[3, 4],
        without=["text_encoder_3"],
        encoders="b",
        loras=["x", ("y", 0.5), Lora(path=Path("z"), scale=2.0)],
    )
    assert loose == typed
    assert build_options(variant="emag", precision="fp16") == build_options(
        variant=emag.Variant.EMAG, precision="float16"
    )
    assert build_options() == build_options(variant=None, loras=()) == BuildOptions()  # type: ignore[arg-type]
    assert build_options(weights="random") == build_options(weights_seed=0) == BuildOptions(weights_seed=0)
    assert default_folder("owner/sd3.5-medium", loose) == Path("sd3.5-medium-emag")
    assert compile_options(targets=["sm89", "sm89"], height_range="512:1024:1536", width_range=64) == (
        EngineOptions(
            targets=("sm89",),
            height_range=SizeRange(min=512, opt=1024, max=1536),
            width_range=SizeRange(min=64, opt=64, max=64),
        )
    )
    assert compile_options() == EngineOptions()


@pytest.mark.parametrize("kind", [str, Path])
def test_building_finds_what_is_there(kind: type[Any], tiny_bundle: Path) -> None:
    """The same words as the fixture's, so nothing is exported; a stranger in the folder is not built over."""
    events: list[Event] = []
    bundle = emag.build(
        "tiny-sd3", kind(tiny_bundle), variant="emag-q", precision="fp32", progress=events.append
    )
    assert bundle.key == Bundle(tiny_bundle).key
    assert (events[-1].component, events[-1].phase) == ("bundle", "reuse")
    with pytest.raises(InputError, match="`overwrite`"):
        emag.build("tiny-sd3", kind(tiny_bundle), variant="emag")


def test_building_names_the_folder_itself(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny-sd3-emag-q").symlink_to(tiny_bundle)
    assert emag.build("tiny-sd3").path == Path("tiny-sd3-emag-q")


def test_unknown_keywords_are_refused_with_those_there_are(pipeline: Pipeline, tiny_bundle: Path) -> None:
    wrong: Any = {"precison": "fp16"}
    cases = (
        (lambda: emag.build("tiny-sd3", **wrong), "variant, renorm, .*precision, "),
        (lambda: emag.compile(tiny_bundle, backend="tensorrt-rtx", **wrong), "targets, max_images, "),
        (lambda: emag.Pipeline.open(tiny_bundle, **wrong), "variant, max_sequence_length, backend, device, "),
        (lambda: pipeline.generate(PROMPT, **wrong), "guidance, guidance_scale, "),
        (lambda: next(pipeline.stream(PROMPT, **wrong)), "guidance, guidance_scale, "),
    )
    for call, known in cases:
        with pytest.raises(InputError, match=rf"there is no (option|keyword) 'precison'; there are {known}"):
            call()


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"variant": "emag-z"}, "there is no variant 'emag-z'; choose emag-q, emag, emag-i, emag-t"),
        ({"renorm": "rows"}, "there is no renorm 'rows'; choose row, "),
        ({"precision": "fp8"}, "there is no precision 'fp8'; choose fp32, fp16, bf16"),
        ({"state_precision": "bf16"}, "there is no state precision 'bf16'; choose fp32, fp16"),
        ({"weights": "mine"}, "there are no `weights` 'mine'; choose checkpoint or random"),
        ({"weights": "checkpoint", "weights_seed": 1}, "`weights_seed` is for `weights` random"),
        ({"loras": [("x", float("nan"))]}, "the LoRA x has the scale nan"),
    ],
)
def test_bad_values_of_build_are_named(keywords: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        emag.build("tiny-sd3", **keywords)


@pytest.mark.parametrize(
    ("prompt", "keywords", "said"),
    [
        ([], {}, "0 prompts with 1 pictures each is nothing to draw"),
        (PROMPT, {"images": 0}, "1 prompts with 0 pictures each is nothing to draw"),
        ("", {}, "the `prompt` is empty"),
        (PROMPT, {"guidance": "magic"}, "magic.*cfg, emag"),
        (PROMPT, {"height": 60}, "`height` 60 is no multiple of 8; take 56 or 64"),
        (PROMPT, {"emag_blocks": (9,)}, "block 9 is no candidate, which are 3, 4, 5"),
    ],
)
def test_bad_values_of_generate_are_named(
    pipeline: Pipeline, prompt: Any, keywords: dict[str, Any], said: str
) -> None:
    for draw in (pipeline.generate, lambda *given, **words: list(pipeline.stream(*given, **words))):
        with pytest.raises(InputError, match=said):
            draw(prompt, **keywords)
