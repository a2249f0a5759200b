"""Small pipelines of diffusers with random weights, and what the reference makes of the same inputs."""

from collections.abc import Iterable
from types import MethodType
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
)
from diffusers.modular_pipelines.stable_diffusion_3.modular_blocks_stable_diffusion_3 import (
    StableDiffusion3T2ICoreDenoiseStep,
)
from torch import Tensor

from emag_export.families import family_of_transformer
from emag_export.kinds import Variant
from emag_export.reference.two_pass import ReferenceStep, two_pass_denoise
from emag_export.runtime.guidance.rules import Guidance
from emag_export.runtime.sampling.conditioning import Conditioning
from emag_export.runtime.sampling.plan import EmagWindows, make_plan
from emag_export.runtime.sampling.schedule import schedule_of
from emag_export.runtime.sampling.select import Choose
from tests.conftest import BLOCKS, small_model
from tests.dit import DDIM, small_dit
from tests.sd3 import conditioning

STEPS, SCALE, EMAG_SCALE = 8, 4.0, 1.5
WORDS: dict[str, Any] = {"emag_candidates": BLOCKS, "emag_scale": EMAG_SCALE}
WORDS |= {"emag_start": 250, "emag_delta": 50, "emag_stop": 50, "emag_unit": "250ths"}
"""The paper's windows for every kind and family, as :class:`EmagWindows` has them by default."""
LABELS = [3, 8]
SIZE = (6, 8)
"""Latents along the sides of pictures; 8 pixels each where there is no autoencoder."""
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
NO_TEXT: dict[str, Any] = {
    f"{part}{number}": None for part in ("tokenizer", "text_encoder") for number in ("", "_2", "_3")
}


def text_pipeline(transformer: Any = None) -> StableDiffusion3Pipeline:
    """A ``StableDiffusion3Pipeline`` that takes embeddings and gives latents."""
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer or small_model(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=None,
        **NO_TEXT,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def modular_pipeline(guider: Any, transformer: Any = None) -> Any:
    """The denoising blocks of the modular pipeline of the same family."""
    pipeline = StableDiffusion3T2ICoreDenoiseStep().init_pipeline()
    pipeline.update_components(
        transformer=transformer or small_model(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        guider=guider,
    )
    return pipeline


def class_pipeline() -> DiTPipeline:
    """A ``DiTPipeline``, whose null class is always 1000."""
    vae = AutoencoderKL(
        block_out_channels=(8,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=1.0,
    )
    scheduler = DDIMScheduler(beta_schedule="linear", clip_sample=False)
    pipeline = DiTPipeline(transformer=small_dit(num_embeds_ada_norm=1000), vae=vae, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def embeddings(images: int = 2, *, negative: bool = True) -> dict[str, Tensor]:
    """What stands for prompts and noise, by name in both pipelines."""
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(images, *shape, generator=generator)

    given = {"latents": normal(4, *SIZE), "prompt_embeds": normal(5, 16), "pooled_prompt_embeds": normal(8)}
    if negative:
        given |= {"negative_prompt_embeds": normal(5, 16), "negative_pooled_prompt_embeds": normal(8)}
    return given


def draw_text(pipeline: Any, given: dict[str, Any], *, scale: float = SCALE, **options: Any) -> Tensor:
    """Latents of a pipeline that is prompted by text."""
    options = {"num_inference_steps": STEPS, "height": 8 * SIZE[0], "width": 8 * SIZE[1], **options}
    latents: Tensor = pipeline(**given, guidance_scale=scale, output_type="latent", **options).images
    return latents


def draw_modular(pipeline: Any, given: dict[str, Any], **options: Any) -> Tensor:
    """Latents of the modular pipeline."""
    options = {"num_inference_steps": STEPS, "height": 8 * SIZE[0], "width": 8 * SIZE[1], **options}
    latents: Tensor = pipeline(**given, output="latents", **options)
    return latents


def draw_classes(pipeline: Any, *, scale: float = SCALE, seed: int = 1, steps: int = STEPS) -> Tensor:
    """Latents of a pipeline that is prompted by class, caught where they are decoded."""
    caught: list[Tensor] = []

    def decode(vae: Any, latents: Tensor) -> Any:
        caught.append(latents)
        return AutoencoderKL.decode(vae, latents)

    pipeline.vae.decode = MethodType(decode, pipeline.vae)
    generator = torch.Generator().manual_seed(seed)
    pipeline(LABELS, guidance_scale=scale, generator=generator, num_inference_steps=steps, output_type="pt")
    return caught[0]


def text_conditioning(given: dict[str, Tensor]) -> Conditioning:
    """Of :func:`embeddings`."""
    names = (
        "prompt_embeds",
        "pooled_prompt_embeds",
        "negative_prompt_embeds",
        "negative_pooled_prompt_embeds",
    )
    return conditioning(*(given[name] for name in names if name in given))


def class_inputs(seed: int = 1) -> tuple[Tensor, Conditioning]:
    """Noise and classes that :func:`draw_classes` begins with."""
    latents = torch.randn(len(LABELS), 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    null = {"class_labels": torch.full((len(LABELS),), 1000)}
    return latents, Conditioning(given={"class_labels": torch.tensor(LABELS)}, negative=null)


def reference(
    model: Any,
    variant: Variant,
    latents: Tensor,
    given: Conditioning,
    *,
    guidance: str = "emag",
    choose: Choose | None = None,
) -> Tensor:
    """Final latents of two full passes per step."""
    family = family_of_transformer(type(model).__name__)
    contract = family.contract(model.config, variant=variant, blocks=BLOCKS)
    config = FLOW if contract.prediction == "velocity" else DDIM
    schedule = schedule_of(config, STEPS, 12, prediction=contract.prediction)
    rule = Guidance(name=guidance, scale=SCALE, emag_scale=EMAG_SCALE)
    plan = make_plan(contract, schedule, rule, EmagWindows(), choose)
    taken: Iterable[ReferenceStep] = two_pass_denoise(model, plan, latents, given)
    *_, last = taken
    return last.latents


def difference(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, relative to the largest number."""
    return float((found - wanted).abs().max() / wanted.abs().max())
