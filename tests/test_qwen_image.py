"""The family qwen_image in PyTorch, part by part, against diffusers' own model and pipeline."""

from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
from torch import Tensor
from torch.nn.functional import pad
from transformers import Qwen2_5_VLForConditionalGeneration

from emag_export.diffusers_guidance.negative import negative_of
from emag_export.diffusers_guidance.pipeline import guide_pipeline
from emag_export.engines.eager import EagerEngine
from emag_export.errors import ModelError
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
from emag_export.runtime.guidance.norm import keep_norm
from emag_export.runtime.guidance.rules import (
    GUIDANCES,
    Guidance,
    GuidanceRule,
    Predictions,
    Terms,
    cfg,
    emag,
)
from emag_export.runtime.loop import denoise
from emag_export.runtime.pictures.decode import decode_latents
from emag_export.runtime.sampling.conditioning import Conditioning
from emag_export.runtime.sampling.plan import EmagWindows, cost_of, make_plan
from emag_export.runtime.sampling.schedule import schedule_of
from emag_export.runtime.sampling.state import RunState
from emag_export.runtime.text.prompts import PromptEncoder
from tests.qwen_image import (
    FLOW,
    WIDTH,
    qwen_image_fork,
    small_autoencoder,
    small_pipeline,
    small_qwen_image,
)

FAMILY = FAMILIES["qwen_image"]
PROMPT, NEGATIVE = "a red circle on the blue square", "small green ring"
LENGTH = 16
"""Tokens of a prompt."""


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


def filled_up(given: Conditioning) -> Conditioning:
    """With as many tokens in the negative as in the others."""
    if given.negative is None:
        return given
    states, mask = given.negative.values()
    missing = given.given["encoder_hidden_states"].shape[1] - states.shape[1]
    negative = dict(zip(given.given, (pad(states, (0, 0, 0, missing)), pad(mask, (0, missing))), strict=True))
    return Conditioning(given=given.given, negative=negative)


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


def of_prompts(pipeline: QwenImagePipeline, *prompts: str) -> dict[str, Tensor]:
    """As the pipeline encodes them together."""
    states, mask = pipeline.encode_prompt(list(prompts))
    if mask is None:
        mask = torch.ones(states.shape[:2], dtype=torch.int64)
    return {"encoder_hidden_states": states, "encoder_hidden_states_mask": mask}


# Measured 2.4e-6 of 3.6.
@pytest.mark.parametrize("variant", [Variant.EMAG_Q, Variant.EMAG, Variant.SKIP])
@pytest.mark.parametrize("scale", [4.0, 1.0])
def test_a_guided_pipeline_is_the_reference(
    variant: Variant, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inside diffusers, where the norm is that of what the transformer answers: it is guided already."""

    def combined(
        rule: GuidanceRule, terms: Terms, found: Predictions, *state: Tensor
    ) -> tuple[Tensor, Tensor]:
        steered = emag(found.cond, found.perturbed, terms.emag_scale)
        if found.uncond is None:
            return steered, state[1]
        return keep_norm(cfg(found.uncond, steered, terms.scale), steered, (2, 2)), state[1]

    monkeypatch.setattr("emag_export.reference.two_pass.combine", combined)
    pipeline, prompts = small_pipeline(), (PROMPT, NEGATIVE)
    latents = torch.randn(2, 4, 10, 6, generator=torch.Generator().manual_seed(3))
    options = {"height": 20, "width": 12, "num_inference_steps": 6, "true_cfg_scale": scale}
    negative = ["", ""] if scale > 1 else None
    with guide_pipeline(pipeline, variant=variant, emag_candidates=(1, 2), emag_scale=1.5):
        packed = QwenImagePipeline._pack_latents(latents, 2, 4, 10, 6)
        found = pipeline(list(prompts), negative, latents=packed, output_type="latent", **options).images
    model = pipeline.transformer
    contract = FAMILY.contract(model.config, variant=variant, blocks=(1, 2))
    schedule = schedule_of(FLOW, 6, 15, prediction="velocity", sigmas=FAMILY.sigmas)
    rule = Guidance(name="emag" if scale > 1 else "emag-only", scale=scale, emag_scale=1.5)
    given = Conditioning(
        given=of_prompts(pipeline, *prompts), negative=of_prompts(pipeline, "", "") if scale > 1 else None
    )
    plan = make_plan(
        contract, schedule, rule, negative_of(FAMILY, model.config, {"variant": variant}).plan(6).windows
    )
    *_, last = two_pass_denoise(model, plan, latents, filled_up(given))
    wanted = QwenImagePipeline._pack_latents(last.latents, 2, 4, 10, 6)
    torch.testing.assert_close(found, wanted, rtol=0, atol=3e-5)
