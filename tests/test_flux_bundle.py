"""A bundle of a small Flux.1 pipeline: from the folder that diffusers saved to pictures and engines."""

import asyncio
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import httpx2
import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from diffusers import FluxPipeline
from PIL import Image

from emag_export.bundle import Bundle, engine_graph_file
from emag_export.cli.main import main
from emag_export.engines.config import EngineConfig
from emag_export.engines.tensorrt.build import plan_engine_build
from emag_export.engines.tensorrt.flavour import flavour_of
from emag_export.engines.tensorrt.options import EngineOptions
from emag_export.exporter.build import build
from emag_export.options import BuildOptions
from emag_export.runtime.batching.options import BatchingOptions
from emag_export.runtime.pictures.metadata import read_picture_record
from emag_export.runtime.pipeline import Pipeline
from emag_export.serve.app import create_app
from emag_export.serve.metrics import Metrics
from emag_export.serve.models import open_models
from emag_export.serve.settings import ServerSettings
from tests.bundles import once
from tests.flux import BLOCKS, TOKENS, save_flux_pipeline

PROMPT = "a large red circle"
SMALL = ("--steps", "4", "--height", "16", "--width", "24")
THREAD = ("--threads", "1")


def run(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(main, [str(word) for word in words], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result.output if code else result.stdout


@pytest.fixture(scope="module")
def pipeline_folder(shared_folder: Path) -> Path:
    return once(shared_folder / "flux-pipeline", save_flux_pipeline)


@pytest.fixture(scope="module")
def flux_bundle(shared_folder: Path, pipeline_folder: Path) -> Path:
    options = BuildOptions(emag_candidates=BLOCKS, max_sequence_length=TOKENS)
    return once(shared_folder / "flux-bundle", lambda path: build(str(pipeline_folder), path, options))


def test_the_bundle_takes_the_scale_of_its_guidance(flux_bundle: Path) -> None:
    bundle = Bundle(flux_bundle)
    assert bundle.components == ["transformer", "text_encoder", "text_encoder_2", "vae_decoder"]
    assert "guidance" in [spec.name for spec in bundle.contract.graph.inputs]
    assert (bundle.defaults.guidance, bundle.defaults.embedded_guidance) == ("emag-only", 3.5)
    assert bundle.preview is not None
    fused = onnx.load(
        flux_bundle / "transformer" / engine_graph_file("onnxruntime"), load_external_data=False
    )
    operators = [node.op_type for node in fused.graph.node]
    assert operators.count("MultiHeadAttention") == 4 and "Softmax" not in operators
    kinds = {value.type.tensor_type.elem_type for value in fused.graph.value_info}
    assert onnx.TensorProto.DOUBLE not in kinds


# Measured: no pixel differs by more than 1 of 255.
@pytest.mark.parametrize(("guidance", "true_cfg"), [("none", 1.0), ("cfg", 3.0)])
def test_plain_pictures_are_those_of_diffusers(
    flux_bundle: Path, pipeline_folder: Path, guidance: str, true_cfg: float
) -> None:
    """Embeddings, noise levels, packing, latents' scale and shift, decoder: everything but EMAG."""
    theirs = FluxPipeline.from_pretrained(pipeline_folder)
    theirs.set_progress_bar_config(disable=True)
    negative = "a blue square" if guidance == "cfg" else None
    wanted = theirs(
        PROMPT,
        negative_prompt=negative,
        true_cfg_scale=true_cfg,
        height=16,
        width=24,
        num_inference_steps=4,
        max_sequence_length=TOKENS,
        generator=torch.Generator().manual_seed(5),
    ).images[0]
    with Pipeline.open(flux_bundle, threads=1) as ours:
        (drawn,) = ours.generate(
            PROMPT,
            guidance=guidance,
            guidance_scale=true_cfg,
            negative_prompt=negative,
            steps=4,
            height=16,
            width=24,
            seed=5,
        )
    difference = np.asarray(drawn).astype(int) - np.asarray(wanted).astype(int)
    assert np.abs(difference).max() <= 1


def test_pictures_remember_the_scale(flux_bundle: Path, tmp_path: Path) -> None:
    words = ("generate", flux_bundle, "--prompt", PROMPT, *SMALL, *THREAD)
    run(*words, "--embedded-guidance", "2", "--previews", "2", "-o", tmp_path / "a.png")
    assert list((tmp_path / "previews").iterdir())
    record = read_picture_record(tmp_path / "a.png")
    assert (record.request.guidance.name, record.request.embedded_guidance) == ("emag-only", 2.0)
    run("generate", flux_bundle, "--like", tmp_path / "a.png", *THREAD, "-o", tmp_path / "b.png")
    run(*words, "-o", tmp_path / "c.png")
    first, again, other = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in "abc")
    assert (first == again).all() and (first != other).any()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ("--negative-prompt", "x"),
            "--negative-prompt would change nothing: this model is distilled, and emag-only makes no",
        ),
        (("--height", "18"), "--height 18 is no multiple of 4"),
        (("--embedded-guidance", "-1"), "--embedded-guidance is -1.0; it must lie between 0.0 and 100.0"),
    ],
)
def test_what_cannot_be_drawn_is_said_first(
    flux_bundle: Path, tmp_path: Path, words: Sequence[str], says: str
) -> None:
    shown = run("generate", flux_bundle, "--prompt", PROMPT, *words, "-o", tmp_path / "a.png", code=2)
    assert says in " ".join(shown.split())
    assert not list(tmp_path.iterdir())


def test_a_model_without_such_an_input_refuses_the_scale(dit_bundle: Path, tmp_path: Path) -> None:
    words = ("generate", dit_bundle, "--prompt", "1", "--embedded-guidance", "2", "-o", tmp_path / "a.png")
    assert "this model has no such input" in run(*words, code=2)


def test_engines_follow_the_reference(flux_bundle: Path) -> None:
    for guidance in ("emag-only", "emag"):
        words = ("--steps", "4", "--height", "16", "--guidance", guidance, *THREAD, "--json")
        found = json.loads(run("compare", flux_bundle, *words))
        assert found["passed"], found["failures"]


def test_a_run_is_compared_with_the_model_s_own_guidance(flux_bundle: Path) -> None:
    plan = json.loads(run("plan", flux_bundle, "--json"))
    assert plan["row_blocks"]["own"] == 28 * 4 and plan["row_blocks"]["planned"] == 28 * 4 + 18 * 3
    assert "1.482 × the model's own guidance" in run("plan", flux_bundle)
    measured = json.loads(
        run("bench", flux_bundle, *SMALL, "--no-memory", "--no-baseline", "--json", *THREAD)
    )
    assert [row["method"] for row in measured["results"]] == ["none", "emag-q-only"]
    assert measured["results"][1]["to_cfg"]["row_blocks"] > 1


@pytest.mark.rehearsal
def test_tables_and_the_server_take_it(flux_bundle: Path, tmp_path: Path) -> None:
    rows = [{"prompt": PROMPT}, {"prompt": PROMPT, "embedded_guidance": 1.5}]
    table = tmp_path / "rows.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    words = ("batch", flux_bundle, "--prompts", table, "-o", tmp_path / "out", *SMALL, *THREAD)
    assert "2 drawn" in run(*words, "--images-per-call", "2")
    metrics = Metrics()
    batching = BatchingOptions(images_per_call=2, live_images=2, threads=1)
    models = open_models([flux_bundle], EngineConfig(threads=1), batching, metrics)
    app = create_app(models, ServerSettings(), metrics)
    body = {"prompt": PROMPT, "num_inference_steps": 4, "seed": 1, "size": "24x16"}

    async def ask() -> tuple[httpx2.Response, ...]:
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://server", timeout=60) as client:
            url = "/v1/images/generations"
            return (
                await client.get("/v1/models"),
                await client.post(url, json={**body, "emag": {"embedded_guidance": 2.0}}),
                await client.post(url, json={**body, "negative_prompt": "x"}),
            )

    try:
        listed, drawn, refused = asyncio.run(ask())
    finally:
        models[0].batched.close()
    facts = listed.json()["data"][0]["emag"]
    assert (facts["guidance"], facts["embedded_guidance"]) == ("emag-only", 3.5)
    assert drawn.status_code == 200 and drawn.json()["size"] == "24x16", drawn.text
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "negative_prompt"


@pytest.mark.rehearsal
def test_it_becomes_an_engine(flux_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle(shutil.copytree(flux_bundle, tmp_path / "bundle"))
    built = plan_engine_build(bundle, flavour_of("tensorrt-rtx"), EngineOptions(targets=("sm89",)))
    assert list(built.run()) == bundle.components
