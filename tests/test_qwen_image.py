"""The family qwen_image, from its blocks to pictures, against diffusers' own model and pipeline."""

import asyncio
import json
import shutil
from collections import Counter
from copy import deepcopy
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from emag_export.bundle import GRAPH_FILE, Bundle, engine_graph_file
from emag_export.cli.main import main
from emag_export.engines.config import EngineConfig
from emag_export.engines.eager import EagerEngine
from emag_export.engines.tensorrt.build import plan_engine_build
from emag_export.engines.tensorrt.flavour import flavour_of
from emag_export.engines.tensorrt.options import EngineOptions
from emag_export.errors import ModelError
from emag_export.exporter.build import build
from emag_export.exporter.describe.identify import identify
from emag_export.exporter.graph.examples import random_inputs
from emag_export.exporter.graph.fork import Forked
from emag_export.families import FAMILIES
from emag_export.families.protocol import Blocks
from emag_export.families.qwen_image.autoencoder import Decoder, encode
from emag_export.families.qwen_image.oracle import predict
from emag_export.families.qwen_image.text_encoder import TextEncoder
from emag_export.kinds import Variant
from emag_export.options import BuildOptions
from emag_export.reference.two_pass import two_pass_denoise
from emag_export.runtime.batching.options import BatchingOptions
from emag_export.runtime.guidance.rules import GUIDANCES, Guidance
from emag_export.runtime.loop import denoise
from emag_export.runtime.pictures.decode import decode_latents
from emag_export.runtime.pipeline import Pipeline
from emag_export.runtime.sampling.conditioning import Conditioning
from emag_export.runtime.sampling.plan import EmagWindows, cost_of, make_plan
from emag_export.runtime.sampling.schedule import schedule_of
from emag_export.runtime.sampling.state import RunState
from emag_export.runtime.text.prompts import PromptEncoder
from emag_export.serve.app import create_app
from emag_export.serve.metrics import Metrics
from emag_export.serve.models import open_models
from emag_export.serve.settings import ServerSettings
from tests.bundles import once
from tests.qwen_image import (
    FLOW,
    WIDTH,
    qwen_image_fork,
    save_qwen_image_pipeline,
    small_autoencoder,
    small_pipeline,
    small_qwen_image,
)

FAMILY = FAMILIES["qwen_image"]
PROMPT, NEGATIVE = "a red circle on the blue square", "small green ring"
LENGTH = 16
"""Tokens of a prompt in the bundle."""
SIDES = ("--height", "24", "--width", "36", "--threads", "1")


@pytest.fixture(scope="session")
def qwen_image_pipeline(shared_folder: Path) -> Path:
    return once(shared_folder / "qwen-image-pipeline", save_qwen_image_pipeline)


@pytest.fixture(scope="session")
def qwen_image_bundle(shared_folder: Path, qwen_image_pipeline: Path) -> Path:
    """That pipeline as emag-q. Read-only: copy it to change it."""
    options = BuildOptions(max_sequence_length=LENGTH, emag_candidates=(1, 2))
    folder = shared_folder / "qwen-image-bundle"
    return once(folder, lambda path: build(str(qwen_image_pipeline), path, options))


def run(*words: object) -> str:
    result = CliRunner().invoke(main, [str(word) for word in words], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.stdout


def unperturbed(module: Forked, h: int, w: int) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs that perturb nothing, and what the original model makes of their branch rows."""
    sizes = {"trunk_rows": 3, "rows": 5, "tracked": 2, "text": 7, "h": h, "w": w}
    inputs = random_inputs(module.contract.graph, sizes, seed=4)
    inputs["layer_mask"] = torch.zeros_like(inputs["layer_mask"])
    rows = inputs["branch_rows"]
    latents, time = (inputs[name].index_select(0, rows) for name in ("hidden_states", "timestep"))
    names = [tensor.name for tensor in module.contract.conditioning]
    given = {name: inputs[name].index_select(0, rows) for name in names}
    return inputs, predict(module.model, latents, time, given)


# Measured 1.2e-6 of 2.7: attention over keys in another order, rotations without complex numbers.
@pytest.mark.parametrize("grid", [(5, 3), (2, 7), (4, 4)])
@pytest.mark.parametrize("variant", list(Variant))
def test_without_a_mask_it_is_the_original_model(variant: Variant, grid: tuple[int, int]) -> None:
    module = qwen_image_fork(variant)
    inputs, wanted = unperturbed(module, *grid)
    torch.testing.assert_close(module(**inputs)[0], wanted, rtol=0, atol=1.5e-5)


@pytest.mark.parametrize("grid", [(5, 3), (2, 7), (1, 1), (6, 6)])
def test_rotations_are_the_models_own(grid: tuple[int, int]) -> None:
    model = small_qwen_image()
    blocks = FAMILY.part("graph").blocks(model)
    assert isinstance(blocks, Blocks) and blocks.num_blocks == 4
    latents, text = torch.zeros(1, 4, 2 * grid[0], 2 * grid[1]), torch.zeros(1, 9, WIDTH)
    given = {"hidden_states": latents, "timestep": torch.zeros(1), "encoder_hidden_states": text}
    given |= {"encoder_hidden_states_mask": torch.ones(1, 9, dtype=torch.int64), **blocks.constants}
    cosine, sine = blocks.embed(given)["rotations"]
    wanted = torch.cat(model.pos_embed([(1, *grid)], max_txt_seq_len=9, device=latents.device))
    assert torch.equal(cosine, wanted.real) and torch.equal(sine, wanted.imag)


# Measured 0; where nothing is clipped the fork gives NaN.
def test_float16_is_clipped_where_the_model_clips() -> None:
    module = qwen_image_fork(precision="float16")
    model: Any = module.model
    block = model.transformer_blocks[0]
    for of in ("img", "txt"):
        getattr(block, f"{of}_mlp").net[2].bias.fill_(6e4)
        getattr(block, f"{of}_mod")[1].bias.fill_(2)  # of it the gate: what is added is infinite
    inputs, wanted = unperturbed(module, 3, 2)
    assert wanted.dtype is torch.float16 and bool(wanted.isfinite().all())
    torch.testing.assert_close(module(**inputs)[0], wanted, rtol=0, atol=2e-3)


def texts(generator: torch.Generator, *lengths: int) -> dict[str, Tensor]:
    """Random prompts of these lengths, filled up with zeros."""
    mask = (torch.arange(9) < torch.tensor(lengths)[:, None]).long()
    states = torch.randn(len(lengths), 9, WIDTH, generator=generator) * mask[:, :, None]
    return {"encoder_hidden_states": states, "encoder_hidden_states_mask": mask}


# Measured 2.0e-6 of 3.9 after six steps, in which the negative is 0.4 to 1.0 away.
@pytest.mark.parametrize("variant", list(Variant))
def test_the_loop_follows_two_passes_of_the_original(variant: Variant) -> None:
    """Prompts of different lengths share the run, and tokens keep their length."""
    module = qwen_image_fork(variant)
    schedule = schedule_of(FLOW, 6, 15, prediction="velocity", sigmas=FAMILY.sigmas)
    guidance = Guidance(scale=4.0, emag_scale=1.5, norm=True)
    plan = make_plan(module.contract, schedule, guidance, EmagWindows(blur_sigma=1.0))
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 10, 6, generator=generator)
    given = Conditioning(given=texts(generator, 9, 4), negative=texts(generator, 1, 2))
    start = RunState.start(module.contract, latents, given.given)
    ours = denoise(EagerEngine(module, module.contract.graph), plan, start, given)
    theirs = two_pass_denoise(module.model, plan, latents, given)
    for got, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got.latents, wanted.latents, rtol=0, atol=3e-5)
        torch.testing.assert_close(got.mask, wanted.mask, rtol=0, atol=0)


def test_the_published_model_costs_what_the_design_counts() -> None:
    """Of 50 steps 30 are guided; each sends one more row through 45 of 60 blocks."""
    plan = identify("qwen-image", BuildOptions(weights_seed=0))
    defaults, contract = plan.defaults, plan.contract
    assert (defaults.height, defaults.steps, defaults.guidance_scale, defaults.cfg_norm) == (
        1328,
        50,
        4.0,
        True,
    )
    assert contract.blocks == (15, 16, 17, 18, 19, 20) and contract.precision == "bfloat16"
    assert (contract.latents, contract.patch) == ((16, "2*h", "2*w"), (2, 2))
    phases = EmagWindows().phases(50)
    cost = cost_of(contract, phases, GUIDANCES["emag"])
    assert (cost.cfg, cost.planned) == (6000, 6000 + 30 * 45)
    assert cost.relative_to_cfg == 1.225
    config = FAMILY.configs["qwen-image"]
    language = Qwen2_5_VLForConditionalGeneration
    with torch.device("meta"):
        made: dict[str, Any] = {
            "qwen-image": QwenImageTransformer2DModel.from_config(dict(config["transformer"])),
            "vae": AutoencoderKLQwenImage.from_config(dict(config["vae"])),
            "text_encoder": language(language.config_class.from_dict(dict(config["text_encoder"]))),
        }
    for name, model in made.items():
        assert sum(tensor.numel() for tensor in model.state_dict().values()) == FAMILY.parameters[name]
    assert FAMILY.parameters["qwen-image"] == 20_430_401_088


def test_other_models_of_the_class_are_refused() -> None:
    config = small_qwen_image(zero_cond_t=True).config
    with pytest.raises(ModelError, match="the transformer has zero_cond_t, which makes no pictures of text"):
        FAMILY.contract(config, variant=Variant.EMAG_Q, blocks=(1,))


def test_prompts_are_embedded_as_the_pipeline_does() -> None:
    pipeline = small_pipeline()
    component = FAMILY.component("text_encoder")
    config = pipeline.text_encoder.config.to_dict()
    engine = EagerEngine(
        TextEncoder(pipeline.text_encoder), component.spec("text_encoder", config, "float32")
    )
    contract = FAMILY.contract(pipeline.transformer.config, variant=Variant.EMAG_Q, blocks=(1,))
    encoder = PromptEncoder(
        {"text_encoder": engine},
        {"text_encoder": pipeline.tokenizer},
        contract=contract,
        max_sequence_length=LENGTH,
    )
    # The pipeline, too, encodes this prompt alone: measured 0.
    prompts = [PROMPT, "", " ", f"{PROMPT} {NEGATIVE} 日本 {{}}", f"{PROMPT} " * 3]
    found = encoder.encode(prompts)
    for index, prompt in enumerate(prompts):
        wanted, _ = pipeline.encode_prompt([prompt], max_sequence_length=LENGTH)
        mask = found.tensors["encoder_hidden_states_mask"][index]
        assert int(mask.sum()) == wanted.shape[1]
        real = found.tensors["encoder_hidden_states"][index, : wanted.shape[1]]
        torch.testing.assert_close(real[None], wanted, rtol=0, atol=1e-6)
        assert not found.tensors["encoder_hidden_states"][index, wanted.shape[1] :].any()
    unseen = [str(cut) for cut in found.cut]
    assert unseen[:3] == ["", "", ""]
    assert unseen[4] == PROMPT, "two of its words are two tokens each"
    assert found.cut[4].describe() == f"Qwen2.5-VL did not see “{PROMPT}”"


# Measured 3.3e-7 of 0.6 decoded; 0 encoded.
def test_pictures_are_decoded_as_the_pipeline_does() -> None:
    vae, latents = small_autoencoder(), torch.randn(2, 4, 5, 7)
    facts = FAMILY.latents(vae.config)
    assert facts.pixels_per_latent == 2
    mean, deviation = (
        torch.tensor(values)[None, :, None, None, None]
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    wanted = vae.decode(latents[:, :, None] / (1.0 / deviation) + mean).sample[:, :, 0]
    component = FAMILY.component("vae_decoder")
    spec = component.spec("vae_decoder", vae.config, "float32")
    pictures = torch.rand(2, 3, 8, 12)
    means = vae.encode(2 * pictures[:, :, None] - 1).latent_dist.mean[:, :, 0]
    torch.testing.assert_close(encode(vae, pictures), means, rtol=0, atol=1e-5)
    module = Decoder(deepcopy(vae)).eval()
    raw = latents * deviation[:, :, 0] + mean[:, :, 0]
    torch.testing.assert_close(module(raw), wanted, rtol=0, atol=3e-6)
    drawn = decode_latents(EagerEngine(module, spec), facts, latents)
    eight_bit = ((wanted / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).numpy()
    assert np.abs(drawn.astype(int) - eight_bit).max() <= 1


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
    words = ("--prompt", PROMPT, "--steps", "4", *SIDES)
    found = json.loads(run("compare", qwen_image_bundle, *words, "--json"))
    assert found["passed"], found["failures"]
    run("generate", qwen_image_bundle, *words, "--seed", "5", "--previews", "2", "-o", tmp_path / "a.png")
    assert (tmp_path / "previews" / "a.step-002.png").is_file()
    table = tmp_path / "prompts.jsonl"
    table.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in (PROMPT, NEGATIVE)), "utf-8")
    rows = ("--prompts", table, "--steps", "4", "--images-per-call", "2", *SIDES)
    assert "2 drawn" in run("batch", qwen_image_bundle, *rows, "-o", tmp_path / "out")


def test_a_server_draws_it(qwen_image_bundle: Path) -> None:
    metrics = Metrics()
    batching = BatchingOptions(images_per_call=2, live_images=2, threads=1)
    models = open_models([qwen_image_bundle], EngineConfig(threads=1), batching, metrics)
    app = create_app(models, ServerSettings(), metrics)

    async def ask() -> list[httpx2.Response]:
        transport = httpx2.ASGITransport(app=app)
        body = {"num_inference_steps": 3, "seed": 1, "size": "36x24", "emag": {"cfg_norm": True}}
        async with httpx2.AsyncClient(transport=transport, base_url="http://server", timeout=60) as client:
            asked = [{**body, "prompt": prompt} for prompt in (PROMPT, NEGATIVE)]
            return await asyncio.gather(*(client.post("/v1/images/generations", json=one) for one in asked))

    try:
        answers = asyncio.run(ask())
    finally:
        models[0].batched.close()
    assert [(answer.status_code, answer.json()["size"]) for answer in answers] == [(200, "36x24")] * 2


def test_it_becomes_engines(qwen_image_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle(shutil.copytree(qwen_image_bundle, tmp_path / "bundle"))
    built = plan_engine_build(bundle, flavour_of("tensorrt-rtx"), EngineOptions(targets=("sm89",)))
    records = built.run()
    assert list(records) == bundle.components
    (profile,) = records["text_encoder"].profiles
    assert profile["tokens"].max == 34 + LENGTH
