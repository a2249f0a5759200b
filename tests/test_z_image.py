"""Z-Image: the fork is diffusers' model, negatives follow the reference, and a pipeline becomes pictures."""

import asyncio
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor

from emag_export.bundle import MANIFEST, Bundle
from emag_export.cli.main import main
from emag_export.diffusers_guidance.pipeline import guide_pipeline
from emag_export.engines.config import EngineConfig
from emag_export.engines.eager import EagerEngine
from emag_export.engines.tensorrt.build import plan_engine_build
from emag_export.engines.tensorrt.flavour import flavour_of
from emag_export.engines.tensorrt.options import EngineOptions
from emag_export.errors import InputError, ModelError
from emag_export.exporter.build import build
from emag_export.exporter.graph.examples import random_inputs
from emag_export.exporter.graph.export import denoiser_sizes
from emag_export.exporter.graph.fork import Forked
from emag_export.exporter.graph.onnx_export import export_graph
from emag_export.exporter.graph.passes import write_engine_graphs
from emag_export.exporter.graph.verify import verify_graph
from emag_export.families import FAMILIES, KNOWN_MODELS
from emag_export.families.z_image.encoder import Qwen3Encoder
from emag_export.kinds import Variant
from emag_export.options import BuildOptions
from emag_export.reference.compare import compare
from emag_export.reference.two_pass import two_pass_denoise
from emag_export.runtime.batching.options import BatchingOptions
from emag_export.runtime.guidance.rules import Guidance
from emag_export.runtime.pipeline import Pipeline
from emag_export.runtime.sampling.conditioning import Conditioning
from emag_export.runtime.sampling.plan import EmagWindows, make_plan
from emag_export.runtime.sampling.schedule import Schedule, schedule_of
from emag_export.serve.app import create_app
from emag_export.serve.metrics import Metrics
from emag_export.serve.models import open_models
from emag_export.serve.settings import ServerSettings
from emag_export.shapes import Sizes
from emag_export.sizes import Geometry, TextRange, picture_sizes
from tests.bundles import once
from tests.z_image import (
    BLOCKS,
    CANDIDATES,
    TEXT,
    WIDTH,
    save_z_image_pipeline,
    small_qwen3,
    z_image_fork,
    z_image_pipeline,
)

FAMILY = FAMILIES["z_image"]
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
THREAD = ("--threads", "1")
LONG = (
    "a very large red circle on a very small blue background, painted in oil by somebody who was in a hurry"
)

# Sums in another order, of maps that are computed anew or of fewer keys: measured 1.6e-6.
ROUNDING = 2e-5


@pytest.fixture(scope="session")
def z_image_folder(shared_folder: Path) -> Path:
    return once(shared_folder / "z-image-pipeline", save_z_image_pipeline)


@pytest.fixture(scope="session")
def z_image_bundle(shared_folder: Path, z_image_folder: Path) -> Path:
    """emag-q; texts of up to 60 tokens, for which the model is fed 64."""
    options = BuildOptions(emag_candidates=CANDIDATES, max_sequence_length=60)

    def make(path: Path) -> None:
        build(str(z_image_folder), path, options)
        # Published models draw 4096 tokens, which servers warm up with: too many for a test.
        manifest = json.loads((path / MANIFEST).read_text("utf-8"))
        manifest["defaults"] |= {"height": 64, "width": 64}
        (path / MANIFEST).write_text(json.dumps(manifest), "utf-8")

    return once(shared_folder / "z-image-bundle", make)


def run(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(main, [str(word) for word in words], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result.output if code else result.stdout


def captions(lengths: list[int], seed: int, text: int = TEXT) -> dict[str, Tensor]:
    mask = (torch.arange(text) < torch.tensor(lengths)[:, None]).long()
    states = torch.randn(len(lengths), text, WIDTH, generator=torch.Generator().manual_seed(seed))
    return {"encoder_hidden_states": states * mask[..., None], "encoder_hidden_states_mask": mask}


def untouched(forked: Forked, feeds: dict[str, Tensor]) -> Tensor:
    """diffusers' own forward on every branch row, without fork and averages."""
    rows = feeds["branch_rows"]
    given = {spec.name: feeds[spec.name][rows] for spec in forked.contract.conditioning}
    with torch.inference_mode():
        found: Tensor = FAMILY.part("oracle").predict(
            forked.model, feeds["hidden_states"][rows], feeds["timestep"][rows], given
        )
    return found


@pytest.mark.parametrize("text", [5, 11, 32, 64])
@pytest.mark.parametrize("sizes", [{"h": 5, "w": 7}, {"h": 3, "w": 8}, {"h": 4, "w": 8}])
@pytest.mark.parametrize("variant", [Variant.EMAG_Q, Variant.SKIP, Variant.EMAG_I])
def test_without_a_mask_the_fork_is_diffusers_own_model(variant: Variant, sizes: Sizes, text: int) -> None:
    """Bit by bit where no mask is needed; maps are computed anew, text of 64 tokens stands behind a mask."""
    forked = z_image_fork(variant)
    given = {"trunk_rows": 4, "rows": 6, "tracked": 2, "text": text, **sizes}
    feeds = random_inputs(forked.contract.graph, given, seed=text)
    feeds["layer_mask"].zero_()
    got = EagerEngine(forked, forked.contract.graph).run(feeds)["noise_pred"]
    exact = variant != Variant.EMAG_I and text <= 32
    torch.testing.assert_close(got, untouched(forked, feeds), rtol=0, atol=0 if exact else ROUNDING)


@pytest.mark.parametrize("variant", Variant)
def test_every_negative_follows_the_reference(variant: Variant) -> None:
    """Captions of other lengths side by side; the longest takes half of the text, the rest is never seen."""
    forked = z_image_fork(variant)
    plan = make_plan(
        forked.contract,
        schedule_of(FLOW, 6, 32, prediction="velocity", sigmas="linear"),
        Guidance(),
        EmagWindows(beta=0.9, blur_sigma=1.0),
    )
    noise = torch.randn(2, 4, 8, 16, generator=torch.Generator().manual_seed(1))
    given = Conditioning(given=captions([20, 3], 2), negative=captions([1, 32], 3))
    steps = list(two_pass_denoise(forked.model, plan, noise, given))
    comparison = compare(EagerEngine(forked, forked.contract.graph), plan, steps)
    assert comparison.passed, comparison.failures()
    moved = [
        float((step.predictions.perturbed - step.predictions.cond).abs().max())
        for step in steps
        if step.mask.sum() > 0
    ]
    assert max(moved) > 1e-3, "the negative is the prediction itself"


def test_a_caption_is_its_own_in_any_company() -> None:
    """Two captions in one call against each alone, with as much text as it needs."""
    forked = z_image_fork()
    engine = EagerEngine(forked, forked.contract.graph)
    sizes = {"trunk_rows": 2, "rows": 2, "tracked": 0, "text": 64, "h": 5, "w": 7}
    feeds = {**random_inputs(forked.contract.graph, sizes), **captions([40, 7], 4)}
    together = engine.run(feeds)["noise_pred"]
    for row, text in enumerate((64, 32)):
        alone = {name: x[row : row + 1] for name, x in feeds.items() if x.shape[0] == 2}
        alone |= {name: alone[name][:, :text] for name in captions([1], 0)}
        alone |= {name: x for name, x in feeds.items() if x.shape[0] == 0}
        alone["branch_rows"] = torch.zeros(1, dtype=torch.int64)
        got = engine.run(alone)["noise_pred"][0]
        torch.testing.assert_close(got, together[row], rtol=0, atol=ROUNDING)


@pytest.mark.rehearsal  # half a minute
def test_maps_are_exported_at_sizes_that_have_them(tmp_path: Path) -> None:
    """No filler of the image is a key then. All attention but that of the refiners' caption is unmasked or
    behind one mask; every one is a fused operator, and the average is computed beside it."""
    forked = z_image_fork(Variant.EMAG)
    sizes = denoiser_sizes(forked.contract)
    assert all(size["h"] * size["w"] % 32 == 0 and size["text"] % 32 == 0 for size in sizes)
    spec, path = forked.contract.graph, tmp_path / "model.onnx"
    export_graph(forked, spec, random_inputs(spec, sizes[0]), path)
    (own,) = write_engine_graphs(path)
    counts = Counter(node.op_type for node in onnx.load(str(own), load_external_data=False).graph.node)
    assert counts["MultiHeadAttention"] == BLOCKS + 2
    for graph in (path, own):
        verify_graph(forked, spec, graph, sizes[1:], "float32")


def test_maps_refuse_other_sizes() -> None:
    geometry = Geometry(pixels_per_latent=8, text=TextRange(least=32, usual=512, most=512))
    config = FAMILY.configs["z-image"]["transformer"]
    maps, queries = (
        FAMILY.contract(config, variant=variant, blocks=(7, 8)) for variant in (Variant.EMAG, Variant.EMAG_Q)
    )
    assert picture_sizes(queries, geometry, height=1280, width=720) == {"h": 80, "w": 45}
    assert picture_sizes(maps, geometry, height=1024, width=1024) == {"h": 64, "w": 64}
    with pytest.raises(
        InputError, match=r"3600 image tokens.*multiple of 32; take `height` 1280 and `width` 736"
    ):
        picture_sizes(maps, geometry, height=1280, width=720)


def test_a_run_costs_what_the_fork_costs() -> None:
    """30 guided steps of 50, 23 of 30 blocks behind the fork: 1 + 30 * 23 / (50 * 2 * 30)."""
    known = KNOWN_MODELS["z-image"]
    config = FAMILY.configs["z-image"]["transformer"]
    contract = FAMILY.contract(config, variant=Variant.EMAG_Q, blocks=known.defaults.candidates)
    assert (contract.num_blocks, contract.heads, contract.head_dim) == (known.blocks, 30, 128)
    assert contract.limits == {"h": 512, "w": 512, "text": 992}
    nothing = (0.0,) * known.defaults.steps
    plan = make_plan(contract, Schedule.flow((*nothing, 0.0), nothing), Guidance())
    assert plan.cost.relative_to_cfg == pytest.approx(1 + 30 * 23 / (50 * 2 * 30))


def test_numbers_of_parameters() -> None:
    from diffusers import ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    for name, configs in FAMILY.configs.items():
        with torch.device("meta"):
            model = ZImageTransformer2DModel.from_config(dict(configs["transformer"]))
            text = Qwen3Model(Qwen3Config.from_dict(dict(configs["text_encoder"])))
        assert sum(weight.numel() for weight in model.parameters()) == FAMILY.parameters[name]
        assert sum(weight.numel() for weight in text.parameters()) == FAMILY.parameters["text_encoder"]
        assert text.config.rope_parameters["rope_theta"] == 1_000_000


def test_half_precision_keeps_scores_in_float32() -> None:
    """Of heads that share keys and values, too. Rounded weights: measured 6e-5 of states up to 0.08."""
    tokens = torch.arange(9)[None] % 7
    with torch.inference_mode():
        wanted = Qwen3Encoder(small_qwen3())(tokens)
        got = Qwen3Encoder(small_qwen3().half())(tokens)
    torch.testing.assert_close(got.float(), wanted, rtol=0, atol=5e-4)


def test_prompts_are_those_of_the_pipeline(z_image_bundle: Path) -> None:
    """Float32 sums of another library, and of a text without its padding: measured 3e-8 of 0.08."""
    pipeline, prompts = z_image_pipeline(), ["a red circle", "", LONG]
    with torch.inference_mode():
        wanted, _ = pipeline.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, max_sequence_length=60
        )
    with Pipeline.open(z_image_bundle, threads=1) as ours:
        encoded = ours.encode(prompts)
    states, mask = (encoded.tensors[spec.name] for spec in ours.bundle.contract.conditioning)
    assert states.shape == (3, 64, WIDTH) and mask.dtype == torch.int64
    for row, expected in enumerate(wanted):
        length = expected.shape[0]
        assert mask[row].tolist() == [1] * length + [0] * (64 - length)
        torch.testing.assert_close(states[row, :length], expected, rtol=0, atol=1e-6)
        assert not states[row, length:].any()
    assert [str(cut) for cut in encoded.cut[:2]] == ["", ""]
    assert LONG.endswith(str(encoded.cut[2])) and len(str(encoded.cut[2])) > 40


@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_a_picture_is_that_of_the_pipeline(z_image_bundle: Path, scale: float) -> None:
    """The pipeline's guidance g is our w = g + 1; its latents are ours of the same seed."""
    words: dict[str, Any] = {"height": 40, "width": 56}
    drawn = z_image_pipeline()(
        "a red circle",
        num_inference_steps=6,
        guidance_scale=scale,
        generator=torch.Generator().manual_seed(5),
        max_sequence_length=60,
        output_type="np",
        **words,
    ).images[0]
    with Pipeline.open(z_image_bundle, threads=1) as ours:
        (picture,) = ours.generate(
            "a red circle", steps=6, guidance="cfg", guidance_scale=scale + 1, seed=5, **words
        )
    got = np.asarray(picture.convert("RGB")) / 255
    assert got.shape == (40, 56, 3)
    # Half of a step of 8 bits is 1.96e-3, and that was measured; latents of both differ by 2e-4 at most.
    assert np.abs(got - drawn).max() < 2.1e-3


def test_every_command_takes_it(z_image_bundle: Path, tmp_path: Path) -> None:
    words = ("--steps", "4", "--height", "40", "--width", "56", *THREAD)
    found = json.loads(run("compare", z_image_bundle, *words, "--json"))
    assert found["passed"], found["failures"]
    many = (
        "--prompt",
        "a red circle",
        "--prompt",
        "a small blue square on a chair",
        "--guidance",
        "emag+cads",
    )
    run("generate", z_image_bundle, *many, *words, "-o", tmp_path, "--previews", "2")
    with Image.open(tmp_path / "0001-seed0.png") as picture:
        assert picture.size == (56, 40)
    table = tmp_path / "prompts.jsonl"
    table.write_text('{"prompt": "a circle"}\n{"prompt": "a very small blue square"}\n', "utf-8")
    batch = ("batch", z_image_bundle, "--prompts", table, "-o", tmp_path / "out", "--images-per-call", "2")
    assert "2 drawn" in run(*batch, *words)


def test_prompts_of_all_lengths_share_a_server_s_calls(z_image_bundle: Path) -> None:
    metrics = Metrics()
    batching = BatchingOptions(images_per_call=2, live_images=2, threads=1)
    models = open_models([z_image_bundle], EngineConfig(threads=1), batching, metrics)
    app = create_app(models, ServerSettings(), metrics)

    async def ask() -> list[httpx2.Response]:
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://server", timeout=120) as client:
            same = {"num_inference_steps": 4, "seed": 1, "size": "40x56"}
            bodies = [{"prompt": prompt, **same} for prompt in ("a circle", LONG)]
            posts = (client.post("/v1/images/generations", json=body) for body in bodies)
            return list(await asyncio.gather(*posts))

    try:
        answers = asyncio.run(ask())
    finally:
        models[0].batched.close()
    assert [answer.status_code for answer in answers] == [200, 200], answers[0].text


def test_it_becomes_an_engine(z_image_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle(shutil.copytree(z_image_bundle, tmp_path / "bundle"))
    built = plan_engine_build(bundle, flavour_of("tensorrt-rtx"), EngineOptions(targets=("sm89",)))
    records = built.run()
    assert list(records) == bundle.components == ["transformer", "text_encoder", "vae_decoder"]
    text = records["transformer"].profiles[0]["text"]
    assert (text.min, text.opt, text.max) == (32, 64, 64)


def test_it_is_not_guided_inside_diffusers() -> None:
    with pytest.raises(ModelError, match=r"Z-Image cannot be guided inside diffusers: .* build a bundle"):
        guide_pipeline(z_image_pipeline())


def test_a_model_of_other_patches_is_refused() -> None:
    from diffusers import ZImageTransformer2DModel

    sizes: dict[str, Any] = {"dim": 16, "n_heads": 1, "n_layers": 1, "axes_dims": [4, 6, 6]}
    with pytest.raises(ModelError, match=r"has the patches 4-1, wanted is 2-1"):
        FAMILY.part("graph").blocks(ZImageTransformer2DModel(all_patch_size=(4,), **sizes))
