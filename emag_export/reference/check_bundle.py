"""A whole bundle against the PyTorch reference: prompts in, comparison out.

Components are opened one after another, and the denoiser only where it fits: a full-size model takes a third
of a workstation's memory in float32, and its engine as much again.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from emag_export.bundle import DENOISER, Bundle
from emag_export.contract import GUIDANCE_INPUT, TensorSpec
from emag_export.engines.protocol import TORCH_DTYPES, Engine
from emag_export.engines.registry import EngineOpener
from emag_export.exporter.eager import open_eager, source_of
from emag_export.exporter.graph.examples import random_mask
from emag_export.exporter.source.load import load_recorded
from emag_export.families.source_model import SourceModel
from emag_export.families.texts import Cut, Encoded
from emag_export.progress import Event, Progress, silent
from emag_export.reference.compare import Decode, compare
from emag_export.reference.comparison import Comparison
from emag_export.reference.forced import with_floor
from emag_export.reference.memory import must_record
from emag_export.reference.two_pass import ReferenceStep, two_pass_denoise
from emag_export.runtime.pictures.decode import decode_latents
from emag_export.runtime.prepare import Encode, Prepared, prepare
from emag_export.runtime.request import GenerationRequest
from emag_export.runtime.text.prompts import PromptEncoder, load_tokenizers
from emag_export.shapes import Sizes, evaluate
from emag_export.shared_encoders import components_of, home_of

__all__ = ["check_bundle", "random_encoder"]

_CPU = torch.device("cpu")


def check_bundle(
    bundle: Bundle,
    open_engine: EngineOpener,
    requests: Sequence[GenerationRequest],
    *,
    source: str | None = None,
    floor: bool = True,
    progress: Progress = silent,
) -> Comparison:
    """Compare a bundle's denoiser with two full passes of the model it was made from.

    Both sides get the same embeddings and the same noise, and the bundle's own decoder makes the pictures
    of both, so what differs is the denoiser. The reference is float32 on the CPU whatever the bundle's
    precision and wherever the engine runs. A bundle without text encoders gets random embeddings, one
    without a decoder no pictures.

    Args:
        bundle: To check.
        open_engine: Decides backend and device.
        requests: One per image; they run as one batch.
        source: Where the source model is now, if it has moved.
        floor: For a bundle in half precision, measure what PyTorch itself loses in that precision, too;
            costs as much as one more engine.
        progress: Told after every step.

    Raises:
        ModelError: If the source model is not at hand or is another one.
        InputError: If the requests do not fit the bundle, or the run does not fit into memory.
    """
    model = source_of(bundle, source)
    floor = floor and bundle.contract.precision != "float32"
    with _encoder(bundle, open_engine) as encode:
        prepared = prepare(bundle, requests, encode, _CPU)
    steps = _reference(bundle, model, prepared, floor)
    recorded = must_record(bundle, prepared, floor=floor)
    if recorded:
        steps, progress = _record(steps, len(prepared.plan.steps), progress)
    with open_engine(bundle, DENOISER) as engine, _decoder(bundle, open_engine) as decode:
        comparison = compare(engine, prepared.plan, steps, decode=decode, progress=progress)
    settings = {
        **comparison.settings,
        "embeddings": _embeddings(bundle, prepared),
        "order": "reference recorded first, to save memory" if recorded else "side by side",
    }
    return replace(comparison, settings=settings)


def _reference(
    bundle: Bundle, source: SourceModel, prepared: Prepared, floor: bool
) -> Iterator[ReferenceStep]:
    """Steps of the float32 model, with the floor if asked for.

    A generator owns its models: nothing is loaded before the first step, nothing stays after the last.
    """
    steps = two_pass_denoise(
        load_recorded(source, "float32", bundle.provenance),
        prepared.plan,
        prepared.latents,
        prepared.conditioning,
        anneal=prepared.anneal,
        noise=prepared.noise,
    )
    if floor:
        steps = with_floor(steps, prepared.plan, partial(open_eager(source), bundle, DENOISER))
    yield from steps


def _record(
    steps: Iterator[ReferenceStep], total: int, progress: Progress
) -> tuple[Iterator[ReferenceStep], Progress]:
    """All steps now, and progress that goes on after them: recording, then both runs of a comparison."""
    recorded = []
    for step in steps:
        recorded.append(step)
        progress(Event(component="reference", phase="step", done=len(recorded), total=3 * total))

    def later(event: Event) -> None:
        progress(replace(event, done=total + event.done, total=total + (event.total or 0)))

    return iter(recorded), later


@contextmanager
def _encoder(bundle: Bundle, open_engine: EngineOpener) -> Iterator[Encode]:
    """The bundle's text encoders, or what stands in for them."""
    with ExitStack() as stack:
        if not _has_encoders(bundle):
            yield random_encoder(bundle)
            return
        names = [name for name in components_of(bundle) if name in bundle.family.tokenizers]
        engines: dict[str, Engine] = {
            name: stack.enter_context(open_engine(home_of(bundle, name), name)) for name in names
        }
        yield PromptEncoder(
            engines,
            load_tokenizers(bundle),
            contract=bundle.contract,
            max_sequence_length=bundle.defaults.max_sequence_length,
            labels=bundle.labels,
        ).encode


def random_encoder(bundle: Bundle) -> Encode:
    """Random numbers in place of what prompts mean: the same prompt always gets the same ones.

    Standard normal embeddings, or classes. A denoiser is not told apart from its reference by what the text
    means, only by whether every input matters to both alike, for which noise serves.

    Args:
        bundle: Gives widths, and the number of tokens its text encoders would give.
    """
    contract, sizes = bundle.contract, {"text": bundle.geometry.text.usual, "trunk_rows": 1}

    def encode(prompts: Sequence[str]) -> Encoded:
        generators = [torch.Generator().manual_seed(_seed(prompt)) for prompt in prompts]
        tensors = {
            tensor.name: torch.cat([_random(tensor, sizes, generator) for generator in generators])
            for tensor in contract.conditioning
            if tensor.name != GUIDANCE_INPUT
        }
        return Encoded(tensors=tensors, cut=(Cut(),) * len(prompts))

    return encode


def _random(tensor: TensorSpec, sizes: Sizes, generator: torch.Generator) -> Tensor:
    shape = evaluate(tensor.dims, sizes)
    if tensor.is_mask:
        return random_mask(shape, generator)
    if tensor.below is not None:
        return torch.randint(0, tensor.below, shape, generator=generator)
    return torch.randn(shape, generator=generator).to(TORCH_DTYPES[tensor.dtype])


def _seed(prompt: str) -> int:
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:7])


@contextmanager
def _decoder(bundle: Bundle, open_engine: EngineOpener) -> Iterator[Decode | None]:
    family = bundle.family
    if family.decoder not in components_of(bundle):
        yield None
        return
    home = home_of(bundle, family.decoder)
    facts = family.latents(home.config(family.decoder))
    with open_engine(home, family.decoder) as decoder:
        yield lambda latents: decode_latents(decoder, facts, latents)


def _has_encoders(bundle: Bundle) -> bool:
    needed = {name for name in bundle.family.needed if name in bundle.family.tokenizers}
    return needed <= set(components_of(bundle))


def _embeddings(bundle: Bundle, prepared: Prepared) -> str:
    shapes = ", ".join(f"{n} {list(t.shape[1:])}" for n, t in prepared.conditioning.given.items())
    if bundle.labels is not None:
        return "none, prompts are classes"
    if _has_encoders(bundle):
        return f"the bundle's text encoders: {shapes}"
    return f"random (standard normal, seeded by each prompt), the bundle has no text encoders: {shapes}"
