"""From a prompt to pictures, on the graphs of a bundle."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from emag_export.bundle import DENOISER, Bundle
from emag_export.contract import GraphSpec
from emag_export.engines.protocol import TORCH_DTYPES, Engine
from emag_export.errors import InputError
from emag_export.runtime.cads import CadsConfig, cads, cads_gamma
from emag_export.runtime.device import to_device
from emag_export.runtime.encode import Encoded, PromptEncoder, load_tokenizers
from emag_export.runtime.loop import Anneal, Conditioning, DenoiseStep, denoise
from emag_export.runtime.plan import Plan
from emag_export.runtime.request import GenerationRequest, plan_request
from emag_export.runtime.select import Select, always, lagged_argmax
from emag_export.runtime.state import StatePool

__all__ = ["EngineOpener", "Pictures", "Pipeline", "Prepared", "cads_annealer", "initial_noise"]

Pictures = UInt8[np.ndarray, "images height width 3"]

EngineOpener = Callable[[Bundle, str], Engine]
"""(bundle, component) to a running engine."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Requests that share a plan, ready for the loop."""

    requests: tuple[GenerationRequest, ...]
    plan: Plan
    latents: Float[Tensor, "images channels height width"]
    conditioning: Conditioning
    select: Select
    anneal: Anneal | None
    cut: tuple[str, ...]
    """Per image the part of the prompt that was beyond the tokenizers' limit."""


class Pipeline:
    """Text encoders, denoiser and decoder of one bundle, opened together and closed together.

    Args:
        bundle: Made by ``build``.
        open_engine: Makes an engine of a component; decides backend and device.
        max_sequence_length: Tokens of the T5 part; None takes the bundle's default.
    """

    def __init__(
        self, bundle: Bundle, open_engine: EngineOpener, *, max_sequence_length: int | None = None
    ) -> None:
        self.bundle = bundle
        self._stack = ExitStack()
        self._states = StatePool()
        with ExitStack() as stack:
            engines = {name: stack.enter_context(open_engine(bundle, name)) for name in bundle.components}
            self._stack = stack.pop_all()
        self.denoiser = engines.pop(DENOISER)
        self._decoder = engines.pop("vae_decoder")
        self._vae = bundle.config("vae_decoder")
        self._encoder = PromptEncoder(
            engines,
            load_tokenizers(bundle),
            text_dim=bundle.contract.text_dim,
            max_sequence_length=max_sequence_length or bundle.defaults.max_sequence_length,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._states.clear()
        self._stack.close()

    def encode(self, prompts: Sequence[str]) -> Encoded:
        """Embed prompts."""
        return self._encoder.encode(prompts)

    def prepare(self, requests: Sequence[GenerationRequest]) -> Prepared:
        """Encode prompts, draw noise and plan; everything before the first step.

        Args:
            requests: May differ in prompt, negative prompt and seed only: the batch runs in step.

        Raises:
            InputError: If the requests cannot share a batch, or do not fit the bundle.
        """
        first = requests[0]
        shared = [replace(r, prompt="-", negative_prompt="", seed=0) for r in requests]
        if any(request != shared[0] for request in shared):
            raise InputError("requests of one batch may differ in prompt, negative prompt and seed only")
        plan = plan_request(self.bundle, first)
        encoded = self.encode([request.prompt for request in requests])
        negative = None
        if first.guidance.rule.uncond:
            negative = self.encode([request.negative_prompt for request in requests])
        generators = [torch.Generator().manual_seed(request.seed) for request in requests]
        factor = self.bundle.vae_factor
        shape = (plan.contract.in_channels, first.height // factor, first.width // factor)
        return Prepared(
            requests=tuple(requests),
            plan=plan,
            latents=initial_noise(shape, generators).to(self.denoiser.device),
            conditioning=Conditioning(
                embeds=encoded.embeds,
                pooled=encoded.pooled,
                negative_embeds=None if negative is None else negative.embeds,
                negative_pooled=None if negative is None else negative.pooled,
            ).to(self.denoiser.device),
            select=lagged_argmax
            if first.fixed_blocks is None
            else always(first.fixed_blocks, plan.contract.blocks),
            anneal=cads_annealer(plan, generators) if first.guidance.rule.cads else None,
            cut=encoded.cut,
        )

    def denoise(self, prepared: Prepared) -> Iterator[DenoiseStep]:
        """Run the loop, yielding after every step.

        The averages lie in buffers that the pipeline lends and takes back at the end of the run: the
        ``state`` of a step is its caller's only until the next step, and the last one's until the next run.
        """
        plan, latents, conditioning = prepared.plan, prepared.latents, prepared.conditioning
        with self._states.lend(plan.contract, latents, conditioning.embeds) as state:
            yield from denoise(
                self.denoiser,
                plan,
                latents,
                conditioning,
                select=prepared.select,
                anneal=prepared.anneal,
                state=state,
            )

    def decode(self, latents: Float[Tensor, "images channels latent_height latent_width"]) -> Pictures:
        """Latents to 8-bit sRGB pictures, one at a time so that memory does not grow with the batch.

        Args:
            latents: On any device.

        Returns:
            On the host, where they arrive in one copy.
        """
        scale, shift = self._vae["scaling_factor"], self._vae.get("shift_factor") or 0.0
        dtype = _input_dtype(self._decoder.spec, "latent_sample")
        samples = [
            self._decoder.run({"latent_sample": (image[None] / scale + shift).to(dtype)})["sample"]
            for image in latents.to(self._decoder.device)
        ]
        pictures = (torch.cat(samples).float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
        return np.asarray((pictures * 255).round().to(torch.uint8).cpu().numpy())


def _input_dtype(spec: GraphSpec, name: str) -> torch.dtype:
    return next(TORCH_DTYPES[tensor.dtype] for tensor in spec.inputs if tensor.name == name)


def initial_noise(
    shape: tuple[int, int, int], generators: Sequence[torch.Generator]
) -> Float[Tensor, "images channels height width"]:
    """Standard normal latents, every image from its own generator: its batch does not change it.

    The numbers are those of diffusers' pipelines for the same CPU generators.
    """
    return torch.cat([torch.randn((1, *shape), generator=generator) for generator in generators])


def cads_annealer(plan: Plan, generators: Sequence[torch.Generator]) -> Anneal:
    """CADS on the prompt embeddings, with noise from every image's own generator."""
    config: CadsConfig = plan.guidance.cads

    def anneal(index: int, conditioning: Conditioning) -> Conditioning:
        gamma = cads_gamma(index, len(plan.steps), config)
        if gamma >= 1:
            return conditioning
        embeds = conditioning.embeds
        noise = torch.cat([torch.randn((1, *embeds.shape[1:]), generator=g) for g in generators])
        mixed = cads(embeds.float(), to_device(noise, embeds.device), gamma, config)
        return replace(conditioning, embeds=mixed.to(embeds.dtype))

    return anneal
