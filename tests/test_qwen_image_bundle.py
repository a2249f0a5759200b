"""A bundle of a Qwen-Image from folder to pictures, against diffusers' pipeline; and its engines."""

import asyncio
import json
import shutil
from collections import Counter
from pathlib import Path

import httpx2
import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from diffusers import QwenImagePipeline

from emag_export.bundle import GRAPH_FILE, MANIFEST, Bundle, engine_graph_file
from emag_export.cli.main import main
from emag_export.engines.config import EngineConfig
from emag_export.engines.tensorrt.build import plan_engine_build
from emag_export.engines.tensorrt.flavour import flavour_of
from emag_export.engines.tensorrt.options import EngineOptions
from emag_export.exporter.build import build
from emag_export.options import BuildOptions
from emag_export.runtime.batching.options import BatchingOptions
from emag_export.runtime.pipeline import Pipeline
from emag_export.serve.app import create_app
from emag_export.serve.metrics import Metrics
from emag_export.serve.models import open_models
from emag_export.serve.settings import ServerSettings
from tests.bundles import once
from tests.qwen_image import save_qwen_image_pipeline

PROMPT, NEGATIVE = "a red circle on the blue square", "small green ring"
LENGTH = 16
"""Tokens of a prompt in the bundle."""
THREAD = ("--threads", "1")


@pytest.fixture(scope="session")
def qwen_image_pipeline(shared_folder: Path) -> Path:
    return once(shared_folder / "qwen-image-pipeline", save_qwen_image_pipeline)


@pytest.fixture(scope="session")
def qwen_image_bundle(shared_folder: Path, qwen_image_pipeline: Path) -> Path:
    """That pipeline as emag-q. Read-only: copy it to change it."""

    def make(path: Path) -> None:
        options = BuildOptions(max_sequence_length=LENGTH, emag_candidates=(1, 2))
        manifest = build(str(qwen_image_pipeline), path, options).path / MANIFEST
        said = json.loads(manifest.read_text("utf-8"))
        said["defaults"] |= {"height": 24, "width": 36}  # servers measure calls at a bundle's own size
        manifest.write_text(json.dumps(said), "utf-8")

    return once(shared_folder / "qwen-image-bundle", make)


def run(*words: object) -> str:
    result = CliRunner().invoke(main, [str(word) for word in words], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.stdout


def test_every_attention_is_fused_and_nothing_is_float64(qwen_image_bundle: Path) -> None:
    folder = qwen_image_bundle / "transformer"
    fused = onnx.load(folder / engine_graph_file("onnxruntime"), load_external_data=False).graph
    operators = Counter(node.op_type for node in fused.node)
    assert (operators["MultiHeadAttention"], operators["Softmax"]) == (4, 0)
    for path in qwen_image_bundle.glob(f"*/{GRAPH_FILE}"):
        graph = onnx.load(path, load_external_data=False).graph
        kinds = {value.type.tensor_type.elem_type for value in graph.value_info}
        assert not kinds & {onnx.TensorProto.DOUBLE, onnx.TensorProto.COMPLEX64}


# Measured 0: both round the same picture to 8 bits. Without keeping the length of tokens it differs by 19.
def test_a_picture_is_the_pipelines(qwen_image_bundle: Path, qwen_image_pipeline: Path) -> None:
    theirs = QwenImagePipeline.from_pretrained(qwen_image_pipeline)
    theirs.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 4, 12, 18, generator=torch.Generator().manual_seed(3))
    words = {"height": 24, "width": 36, "negative_prompt": NEGATIVE}
    (wanted,) = theirs(
        PROMPT,
        **words,
        num_inference_steps=6,
        latents=QwenImagePipeline._pack_latents(latents, 1, 4, 12, 18),
        output_type="np",
    ).images
    with Pipeline.open(qwen_image_bundle, threads=1) as pipeline:
        (ours,) = pipeline.generate(PROMPT, guidance="cfg", seed=3, steps=6, **words)  # type: ignore[arg-type]
    assert np.abs(np.asarray(ours).astype(int) - (wanted * 255).round()).max() <= 1


def test_it_is_compared_and_drawn_by_every_way(qwen_image_bundle: Path, tmp_path: Path) -> None:
    words = ("--prompt", PROMPT, "--steps", "4", *THREAD)
    found = json.loads(run("compare", qwen_image_bundle, *words, "--json"))
    assert found["passed"], found["failures"]
    run("generate", qwen_image_bundle, *words, "--seed", "5", "--previews", "2", "-o", tmp_path / "a.png")
    assert (tmp_path / "previews" / "a.step-002.png").is_file()
    table = tmp_path / "prompts.jsonl"
    table.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in (PROMPT, NEGATIVE)), "utf-8")
    rows = ("--prompts", table, "--steps", "4", "--images-per-call", "2", *THREAD)
    assert "2 drawn" in run("batch", qwen_image_bundle, *rows, "-o", tmp_path / "out")


def test_a_server_draws_it(qwen_image_bundle: Path) -> None:
    metrics = Metrics()
    batching = BatchingOptions(images_per_call=2, live_images=2, threads=1)
    models = open_models([qwen_image_bundle], EngineConfig(threads=1), batching, metrics)
    app = create_app(models, ServerSettings(), metrics)

    async def ask() -> list[httpx2.Response]:
        transport = httpx2.ASGITransport(app=app)
        body = {"num_inference_steps": 3, "seed": 1, "emag": {"cfg_norm": True}}
        async with httpx2.AsyncClient(transport=transport, base_url="http://server", timeout=60) as client:
            asked = [{**body, "prompt": prompt} for prompt in (PROMPT, NEGATIVE)]
            return await asyncio.gather(*(client.post("/v1/images/generations", json=one) for one in asked))

    try:
        answers = asyncio.run(ask())
    finally:
        models[0].batched.close()
    assert [(answer.status_code, answer.json()["size"]) for answer in answers] == [(200, "36x24")] * 2


@pytest.mark.rehearsal
def test_it_becomes_engines(qwen_image_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle(shutil.copytree(qwen_image_bundle, tmp_path / "bundle"))
    built = plan_engine_build(bundle, flavour_of("tensorrt-rtx"), EngineOptions(targets=("sm89",)))
    records = built.run()
    assert list(records) == bundle.components
    (profile,) = records["text_encoder"].profiles
    assert profile["tokens"].max == 34 + LENGTH
