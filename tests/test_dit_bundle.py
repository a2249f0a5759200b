"""A bundle of a DiT from folder to pictures: every command, the server, batches and engines."""

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from PIL import Image

from emag_export.bundle import GRAPH_FILE, Bundle, engine_graph_file
from emag_export.cli.main import main
from emag_export.engines.config import EngineConfig
from emag_export.engines.tensorrt.build import plan_engine_build
from emag_export.engines.tensorrt.flavour import flavour_of
from emag_export.engines.tensorrt.options import EngineOptions
from emag_export.errors import InputError
from emag_export.runtime.batching.options import BatchingOptions
from emag_export.runtime.pictures.metadata import read_picture_record
from emag_export.runtime.pipeline import Pipeline
from emag_export.serve.app import create_app
from emag_export.serve.metrics import Metrics
from emag_export.serve.models import open_models
from emag_export.serve.settings import ServerSettings
from emag_export.shared_encoders import components_of
from tests.bundles import once
from tests.dit import CLASSES

STEPS = ("--steps", "6")
THREAD = ("--threads", "1")


def run(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(main, [str(word) for word in words], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result.output if code else result.stdout


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.fixture(scope="session")
def ddpm_bundle(shared_folder: Path, dit_pipeline: Path, dit_bundle: Path) -> Path:
    """With the sampler of the papers, maps in place of queries, and the released frequencies; it has its
    decoder of the other bundle."""

    def make(path: Path) -> None:
        source = path.with_name("dit-ddpm-pipeline")
        shutil.copytree(dit_pipeline, source)
        config = source / "scheduler" / "scheduler_config.json"
        changed = {"_class_name": "DDPMScheduler", "variance_type": "learned_range"}
        config.write_text(json.dumps({**json.loads(config.read_text("utf-8")), **changed}), "utf-8")
        words = ("build", "--model", source, "-o", path, "--variant", "emag", "--encoders", dit_bundle)
        run(*words, "--timestep-shift", "0", "--backend", "none")

    return once(shared_folder / "dit-ddpm-bundle", make)


def test_the_bundle_says_what_prompts_are(dit_bundle: Path, ddpm_bundle: Path) -> None:
    bundle = Bundle(dit_bundle)
    assert bundle.components == ["transformer", "vae_decoder"]
    assert bundle.contract.graph.symbols == ("trunk_rows", "rows", "tracked")
    assert bundle.labels is not None and bundle.labels.null == CLASSES
    assert bundle.labels.names[:2] == ("tench, Tinca tinca", "goldfish")
    assert bundle.preview is not None
    shown = run("inspect", dit_bundle)
    assert "prompts are classes, 0 to 9: tench, goldfish, 2, 3, pier, 5, 6, 7 …" in shown
    sizes = json.loads(run("inspect", dit_bundle, "--json"))["memory"]["sizes"]
    assert [(row["images"], row["height"]) for row in sizes] == [(1, 16), (4, 16)]
    other = Bundle(ddpm_bundle)
    assert other.components == ["transformer"] and components_of(other) == bundle.components
    assert (other.options.timestep_shift, other.options.max_sequence_length) == (0.0, None)
    assert other.rebuild().arguments["timestep_shift"] == 0.0
    assert "timestep shift 0" in run("inspect", ddpm_bundle)


def test_the_graph_is_fused_and_holds_equal_embeddings_once(dit_bundle: Path) -> None:
    folder = dit_bundle / "transformer"
    fused = onnx.load(folder / engine_graph_file("onnxruntime"), load_external_data=False).graph
    assert sum(node.op_type == "MultiHeadAttention" for node in fused.node) == 4
    assert not any(node.op_type == "Softmax" for node in fused.node)
    graph = onnx.load(folder / GRAPH_FILE, load_external_data=False).graph
    tables = [tensor.name for tensor in graph.initializer if list(tensor.dims) == [CLASSES + 1, 16]]
    assert len(tables) == 1
    kinds = {value.type.tensor_type.elem_type for value in graph.value_info}
    assert onnx.TensorProto.DOUBLE not in kinds


def test_pictures_by_name_by_number_and_by_nothing(dit_bundle: Path, tmp_path: Path) -> None:
    words = ("generate", dit_bundle, *STEPS, *THREAD)
    many = ("--prompt", "Goldfish", "--prompt", "1", "--previews", "3")
    run(*words, *many, "-o", tmp_path, "--negative-prompt", "tench")
    named, numbered = (tmp_path / f"000{index}-seed0.png" for index in (0, 1))
    assert pixels(named).shape == (16, 16, 3)
    assert (pixels(named) == pixels(numbered)).all()
    assert (tmp_path / "previews" / "0000-seed0.step-003.png").is_file()
    record = read_picture_record(named)
    assert (record.request.prompt, record.request.negative_prompt) == ("Goldfish", "tench")
    like = tmp_path / "like" / "a.png"
    run("generate", dit_bundle, "--like", named, *THREAD, "-o", like, "--prompt", "goldfish")
    assert (pixels(like) == pixels(named)).all()
    null = tmp_path / "null" / "a.png"
    run(*words, "--prompt", "", "--guidance", "emag-only", "-o", null)
    assert (pixels(null) != pixels(named)).any()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--prompt", "gold fish"), "--prompt of this model is a class: there is no class 'gold fish'"),
        (("--prompt", "a red circle on a blue background"), "the nearest names are"),
        (("--prompt", "10"), "there is no class 10; give a number from 0 to 9"),
        (("--prompt", "1", "--negative-prompt", "crane"), "the classes 2 and 3; give one of these numbers"),
        (("--prompt", ""), "the --prompt is empty"),
        (("--prompt", "1", "--height", "64"), "--height 64 is not what this model was made for; take 16"),
        (("--prompt", "1", "--guidance", "cads"), "DiT takes no prompt embeddings to anneal"),
    ],
)
def test_what_cannot_be_drawn_is_said_first(
    dit_bundle: Path, tmp_path: Path, words: tuple[str, ...], says: str
) -> None:
    shown = run("generate", dit_bundle, *words, "-o", tmp_path / "a.png", code=2)
    assert says in " ".join(shown.split())
    assert not list(tmp_path.iterdir())


def test_engines_follow_the_reference(dit_bundle: Path, ddpm_bundle: Path) -> None:
    """DDPM adds noise, which both sides must get; its averages are maps, its frequencies released."""
    for bundle in (dit_bundle, ddpm_bundle):
        found = json.loads(run("compare", bundle, "--steps", "4", *THREAD, "--json"))
        assert found["passed"], found["failures"]
    assert "embeddings: none, prompts are classes" in run("compare", dit_bundle, "--steps", "2", *THREAD)


def test_a_run_is_planned_and_measured(dit_bundle: Path) -> None:
    plan = json.loads(run("plan", dit_bundle, "--json"))
    assert len(plan["steps"]) == 250 and plan["row_blocks"]["cfg"] == 250 * 2 * 4
    words = ("bench", dit_bundle, "--steps", "4", "--no-memory", "--json", *THREAD)
    measured = json.loads(run(*words))
    assert (measured["setup"]["image_tokens"], measured["setup"]["text_tokens"]) == (16, 0)
    assert len(measured["results"]) == 4


def test_a_table_of_classes_is_drawn(dit_bundle: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": 3}, {"prompt": "pier", "negative_prompt": "tench"}]
    table = tmp_path / "classes.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    words = ("batch", dit_bundle, "--prompts", table, "-o", tmp_path / "out", "--steps", "4", *THREAD)
    assert "2 drawn" in run(*words, "--images-per-call", "2")
    table.write_text(json.dumps({"prompt": 11}) + "\n" + json.dumps({"prompt": "owl"}) + "\n", "utf-8")
    shown = run(*words, code=2)
    assert "row 0: the --prompt of this model is a class: there is no class 11" in shown
    assert "row 1: the --prompt of this model is a class: there is no class 'owl'" in shown


def test_the_server_tells_its_classes_and_draws_them(ddpm_bundle: Path) -> None:
    metrics = Metrics()
    batching = BatchingOptions(images_per_call=2, live_images=2, threads=1)
    models = open_models([ddpm_bundle], EngineConfig(threads=1), batching, metrics)
    app = create_app(models, ServerSettings(), metrics)

    async def ask() -> tuple[httpx2.Response, ...]:
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://server", timeout=60) as client:
            bodies = [
                {"prompt": prompt, "num_inference_steps": 4, "seed": 1} for prompt in ("goldfish", "a tree")
            ]
            return (
                await client.get("/v1/models"),
                *[await client.post("/v1/images/generations", json=body) for body in bodies],
            )

    try:
        listed, drawn, refused = asyncio.run(ask())
    finally:
        models[0].batched.close()
    facts = listed.json()["data"][0]["emag"]
    assert (facts["prompt"], facts["class_count"], facts["classes"][:2]) == (
        "class",
        10,
        ["tench", "goldfish"],
    )
    assert "cads" not in facts["guidances"] and "emag" in facts["guidances"]
    assert drawn.status_code == 200 and drawn.json()["size"] == "16x16", drawn.text
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert error["param"] == "prompt" and "there is no class 'a tree'" in error["message"]


def test_a_bundle_without_text_takes_no_text_length(dit_bundle: Path) -> None:
    with pytest.raises(InputError, match="takes no text; leave out `max_sequence_length`"):
        Pipeline.open(dit_bundle, max_sequence_length=5)


def test_it_becomes_an_engine_of_a_fixed_size(dit_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle(shutil.copytree(dit_bundle, tmp_path / "bundle"))
    built = plan_engine_build(bundle, flavour_of("tensorrt-rtx"), EngineOptions(targets=("sm89",)))
    records = built.run()
    assert list(records) == bundle.components
    (profile,) = records["vae_decoder"].profiles
    assert profile["h"] == profile["w"], "pictures of one size only"
    assert (profile["h"].min, profile["h"].max) == (8, 8)
