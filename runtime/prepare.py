"""From requests to what the loop takes: conditioning, noise, plan. The denoiser need not be open for it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from emag_export.bundle import Bundle
from emag_export.contract import GUIDANCE_INPUT
from emag_export.engines.protocol import TORCH_DTYPES
from emag_export.errors import InputError
from emag_export.families import family_of
from emag_export.families.texts import Cut, Encoded
from emag_export.runtime.device import to_device
from emag_export.runtime.guidance.cads import cads, cads_gamma
from emag_export.runtime.loop import Anneal, DrawNoise
from emag_export.runtime.request import GenerationRequest, plan_request
from emag_export.runtime.sampling.conditioning import Conditioning
from emag_export.runtime.sampling.plan import Plan
from emag_export.shapes import evaluate

__all__ = ["Encode", "Prepared", "cads_annealer", "initial_noise", "prepare"]

Encode = Callable[[Sequence[str]], Encoded]
"""Prompts to their embeddings."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Requests that share a plan, ready for the loop."""

    requests: tuple[GenerationRequest, ...]
    plan: Plan
    latents: Float[Tensor, "images channels *sides"]
    conditioning: Conditioning
    anneal: Anneal | None
    noise: DrawNoise | None
    """For samplers that add noise at every step."""
    cut: tuple[Cut, ...]
    """Per image the parts of the prompt that were beyond the encoders' limits."""


def prepare(
    bundle: Bundle, requests: Sequence[GenerationRequest], encode: Encode, device: torch.device
) -> Prepared:
    """Encode prompts, draw noise and plan; everything before the first step.

    Args:
        bundle: That will run.
        requests: May differ in prompt, negative prompt and seed only: the batch runs in step.
        encode: Embeds prompts.
        device: Where latents and conditioning shall lie.

    Raises:
        InputError: If the requests cannot share a batch, or do not fit the bundle.
    """
    first = requests[0]
    shared = [replace(r, prompt="-", negative_prompt="", seed=0) for r in requests]
    if any(request != shared[0] for request in shared):
        raise InputError("requests of one batch may differ in prompt, negative prompt and seed only")
    plan = plan_request(bundle, first)
    encoded = encode([request.prompt for request in requests])
    negative = None
    if any(step.rule.uncond for step in plan.steps):
        negative = encode([request.negative_prompt for request in requests])
    generators = [torch.Generator().manual_seed(request.seed) for request in requests]
    contract = plan.contract
    numbers = {GUIDANCE_INPUT: _embedded_guidance(requests)} if contract.embeds_guidance else {}
    # The encoders may have another precision.
    dtypes = {tensor.name: TORCH_DTYPES[tensor.dtype] for tensor in contract.conditioning}

    def typed(found: Encoded) -> dict[str, Tensor]:
        tensors = {**found.tensors, **numbers}
        return {name: tensor.to(dtypes[name]) for name, tensor in tensors.items()}

    shape = evaluate(contract.latents, first.sizes(bundle))
    given = Conditioning(given=typed(encoded), negative=None if negative is None else typed(negative))
    ancestral = any(step.log_variance is not None for step in plan.steps)
    return Prepared(
        requests=tuple(requests),
        plan=plan,
        latents=initial_noise(shape, generators).to(device),
        conditioning=given.to(device),
        anneal=cads_annealer(plan, generators) if first.guidance.rule.cads else None,
        noise=(lambda index: to_device(initial_noise(shape, generators), device)) if ancestral else None,
        cut=encoded.cut,
    )


def _embedded_guidance(requests: Sequence[GenerationRequest]) -> Float[Tensor, " images"]:
    """The scale that a distilled model takes; unconditional rows get the same one, as in diffusers."""
    scales = [request.embedded_guidance for request in requests]
    assert None not in scales, "plan_request refuses such a request"
    return torch.tensor(scales)


def initial_noise(
    shape: Sequence[int], generators: Sequence[torch.Generator]
) -> Float[Tensor, "images channels *sides"]:
    """Standard normal latents, every image from its own generator: its batch does not change it.

    The numbers are those of diffusers' pipelines for the same CPU generators.

    Args:
        shape: Of one image.
        generators: One per image, on the CPU.
    """
    return torch.cat([torch.randn((1, *shape), generator=generator) for generator in generators])


def cads_annealer(plan: Plan, generators: Sequence[torch.Generator]) -> Anneal:
    """CADS on the prompt embeddings, with noise from every image's own generator.

    Args:
        plan: Of the run.
        generators: One per image, on the CPU.
    """
    config, name = plan.guidance.cads, family_of(plan.contract).annealed
    assert name is not None, "plan_request refuses such a guidance"

    def anneal(index: int, conditioning: Conditioning) -> Conditioning:
        gamma = cads_gamma(index, len(plan.steps), config)
        if gamma >= 1:
            return conditioning
        embeds = conditioning.given[name]
        noise = torch.cat([torch.randn((1, *embeds.shape[1:]), generator=g) for g in generators])
        mask = conditioning.given.get(f"{name}_mask")
        mixed = cads(embeds.float(), to_device(noise, embeds.device), gamma, config, mask)
        return replace(conditioning, given={**conditioning.given, name: mixed.to(embeds.dtype)})

    return anneal
