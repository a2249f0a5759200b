"""The family flux in PyTorch: its fork is diffusers' model, and follows the two-pass reference of it."""

from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline

from emag_export.diffusers_guidance.pipeline import guide_pipeline
from emag_export.engines.eager import EagerEngine
from emag_export.exporter.graph.examples import random_inputs
from emag_export.families import FAMILIES
from emag_export.families.flux.oracle import latents_size, predict
from emag_export.families.packing import pack, unpack
from emag_export.families.protocol import Blocks
from emag_export.families.rotary import rotary_table
from emag_export.kinds import Variant
from emag_export.reference.two_pass import two_pass_denoise
from emag_export.runtime.guidance.rules import GUIDANCES, Guidance
from emag_export.runtime.loop import denoise
from emag_export.runtime.sampling.conditioning import Conditioning
from emag_export.runtime.sampling.plan import EmagWindows, Phase, cost_of, make_plan
from emag_export.runtime.sampling.schedule import schedule_of
from emag_export.runtime.sampling.state import RunState
from tests.flux import POOLED, TEXT, flux_fork, flux_pipeline, small_flux
from tests.thinned import mostly_slow

FLUX = FAMILIES["flux"]
DYNAMIC = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "use_dynamic_shifting": True}


# Measured 1.1e-6 of 2.7.
@pytest.mark.parametrize("sides", [(3, 4), (5, 2)])
@pytest.mark.parametrize("guidance_embeds", [True, False])
@pytest.mark.parametrize("variant", [Variant.EMAG_Q, Variant.EMAG])
def test_without_a_mask_it_is_the_original_model(
    variant: Variant, guidance_embeds: bool, sides: tuple[int, int]
) -> None:
    module = flux_fork(variant, guidance_embeds=guidance_embeds)
    assert module.contract.embeds_guidance == guidance_embeds
    height, width = sides
    sizes = {"trunk_rows": 3, "rows": 5, "tracked": 2, "text": 7, "h": height, "w": width}
    inputs = random_inputs(module.contract.graph, sizes, seed=4)
    inputs["layer_mask"].zero_()
    names = ("hidden_states", "timestep", *(spec.name for spec in module.contract.conditioning))
    given = {name: inputs[name].index_select(0, inputs["branch_rows"]) for name in names}
    wanted = predict(module.model, given.pop("hidden_states"), given.pop("timestep"), given)
    torch.testing.assert_close(module(**inputs)[0], wanted, rtol=0, atol=1e-5)


# Measured 7e-6 of 4 after eight steps, maps with a text block; the choice of blocks is the same throughout.
@pytest.mark.parametrize("name", ["emag", "emag-only"])
@pytest.mark.parametrize("variant", mostly_slow(Variant, Variant.EMAG_Q, Variant.EMAG))
def test_the_loop_follows_two_passes_of_the_original(variant: Variant, name: str) -> None:
    module = flux_fork(variant)
    contract = module.contract
    schedule = schedule_of(DYNAMIC, 8, 12, prediction="velocity", sigmas="linear")
    plan = make_plan(contract, schedule, Guidance(name=name, scale=3.0, emag_scale=2.0))
    generator = torch.Generator().manual_seed(1)

    def embeddings() -> dict[str, torch.Tensor]:
        return {
            "encoder_hidden_states": torch.randn(2, 7, TEXT, generator=generator),
            "pooled_projections": torch.randn(2, POOLED, generator=generator),
            "guidance": torch.tensor([3.5, 1.0]),
        }

    latents = torch.randn(2, 4, 6, 8, generator=generator)
    given = Conditioning(given=embeddings(), negative=embeddings())
    ours = denoise(
        EagerEngine(module, contract.graph), plan, RunState.start(contract, latents, given.given), given
    )
    theirs = list(two_pass_denoise(module.model, plan, latents, given))
    for got, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got.latents, wanted.latents, rtol=0, atol=1e-4)
        torch.testing.assert_close(got.mask, wanted.mask, rtol=0, atol=0)
    guided = [step for step in theirs if float(step.mask.max()) > 0]
    assert guided and all(
        float((step.predictions.perturbed - step.predictions.cond).abs().max()) > 1e-3 for step in guided
    )


def test_packing_and_tables_are_those_of_diffusers() -> None:
    """Bit for bit."""
    latents = torch.randn(2, 4, 6, 10)
    packed = FluxPipeline._pack_latents(latents, 2, 4, 6, 10)
    assert torch.equal(pack(latents), packed) and torch.equal(unpack(packed, (3, 5)), latents)
    ids = FluxPipeline._prepare_latent_image_ids(1, 3, 5, torch.device("cpu"), torch.float32)
    assert latents_size({"img_ids": ids, "hidden_states": packed}) == (4, 6, 10)
    cos, sin = FluxPosEmbed(theta=10000, axes_dim=[16, 56, 56])(torch.arange(512.0)[:, None].expand(-1, 3))
    made_cos, made_sin = rotary_table(512, 56, theta=10000)
    assert torch.equal(made_cos.repeat_interleave(2, dim=1), cos[:, 16:72])
    assert torch.equal(made_sin.repeat_interleave(2, dim=1), sin[:, 72:])


def test_double_and_single_blocks_are_counted_as_one_depth() -> None:
    blocks = FLUX.part("graph").blocks(small_flux())
    assert isinstance(blocks, Blocks) and blocks.num_blocks == 4
    dev = FLUX.models["flux.1-dev"]
    contract = FLUX.contract(
        FLUX.configs["flux.1-dev"]["transformer"], variant=Variant.EMAG_Q, blocks=dev.defaults.candidates
    )
    assert (contract.num_blocks, contract.blocks) == (57, (14, 15, 16, 17, 18, 19))
    phases = EmagWindows().phases(28)
    own = cost_of(contract, phases, GUIDANCES["emag-only"], distilled=True)
    assert (own.planned, own.own, own.cfg) == (28 * 57 + 18 * 43, 28 * 57, 2 * 28 * 57)
    assert own.relative_to_own == pytest.approx(1.485, abs=5e-4)
    assert cost_of(contract, phases, GUIDANCES["emag"]).relative_to_own == pytest.approx(1.242, abs=5e-4)
    assert cost_of(contract, (Phase.PLAIN,) * 28, GUIDANCES["none"], distilled=True).relative_to_own == 1


# Measured 3e-6: the pipeline's own CFG adds to a guided prediction what our loop adds in one go.
@pytest.mark.parametrize("true_cfg", [1.0, 3.0])
def test_its_pipeline_can_be_guided(true_cfg: float) -> None:
    """With true CFG, diffusers calls the model twice in a step, and the second call is not guided."""
    pipeline = flux_pipeline()
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(1, 4, 6, 8, generator=generator)
    embeds = {"prompt_embeds": torch.randn(1, 7, TEXT, generator=generator)}
    embeds |= {"pooled_prompt_embeds": torch.randn(1, POOLED, generator=generator)}
    negative = {f"negative_{name}": torch.randn(x.shape, generator=generator) for name, x in embeds.items()}
    words: dict[str, Any] = {
        "emag_candidates": (1, 2),
        "emag_scale": 2.0,
        "emag_start": 250,
        "emag_delta": 50,
        "emag_stop": 50,
    }
    with guide_pipeline(pipeline, **words):
        drawn = pipeline(
            **embeds,
            **negative,
            true_cfg_scale=true_cfg,
            latents=pack(latents),
            height=12,
            width=16,
            num_inference_steps=8,
            output_type="latent",
        ).images
    contract = FLUX.contract(pipeline.transformer.config, variant=Variant.EMAG_Q, blocks=(1, 2))
    name = "emag-only" if true_cfg == 1.0 else "emag"
    plan = make_plan(
        contract,
        schedule_of(dict(pipeline.scheduler.config), 8, 12, prediction="velocity", sigmas="linear"),
        Guidance(name=name, scale=true_cfg, emag_scale=2.0),
    )
    given, absent = (
        {
            "encoder_hidden_states": part[f"{prefix}prompt_embeds"],
            "pooled_projections": part[f"{prefix}pooled_prompt_embeds"],
            "guidance": torch.tensor([3.5]),
        }
        for prefix, part in (("", embeds), ("negative_", negative))
    )
    *_, last = two_pass_denoise(
        pipeline.transformer, plan, latents, Conditioning(given=given, negative=absent)
    )
    torch.testing.assert_close(drawn, pack(last.latents), rtol=0, atol=1e-4)
