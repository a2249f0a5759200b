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

from emag_export.bundle import DENOISER, Bundle
from emag_export.engines.protocol import Engine
from emag_export.exporter.components import load_transformer
from emag_export.exporter.eager import open_eager, source_of
from emag_export.exporter.source.find import SourceModel
from emag_export.exporter.source.lora import recorded_loras
from emag_export.reference.compare import Decode, Progress, compare
from emag_export.reference.comparison import Comparison
from emag_export.reference.forced import with_floor
from emag_export.reference.memory import must_record
from emag_export.reference.two_pass import ReferenceStep, two_pass_denoise
from emag_export.runtime.pictures.decode import decode_latents
from emag_export.runtime.pipeline import EngineOpener
from emag_export.runtime.prepare import Encode, Prepared, prepare
from emag_export.runtime.request import GenerationRequest
from emag_export.runtime.text.encode import Cut, Encoded, PromptEncoder, load_tokenizers
from emag_export.shared_encoders import components_of, home_of

__all__ = ["check_bundle", "random_encoder"]

_CPU = torch.device("cpu")
_ENCODERS = ("text_encoder", "text_encoder_2")
"""Without these two there is no conditioning; a third one is optional."""


def check_bundle(
    bundle: Bundle,
    open_engine: EngineOpener,
    requests: Sequence[GenerationRequest],
    *,
    model: str | None = None,
    floor: bool = True,
    progress: Progress | None = None,
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
        model: Where the source model is now, if it has moved.
        floor: For a bundle in half precision, measure what PyTorch itself loses in that precision, too;
            costs as much as one more engine.
        progress: Told after every step.

    Raises:
        ModelError: If the source model is not at hand or is another one.
        InputError: If the requests do not fit the bundle, or the run does not fit into memory.
    """
    source = source_of(bundle, model)
    floor = floor and bundle.contract.precision != "float32"
    with _encoder(bundle, open_engine) as encode:
        prepared = prepare(bundle, requests, encode, _CPU)
    steps = _reference(bundle, source, prepared, floor)
    recorded = must_record(bundle, prepared, floor=floor)
    if recorded:
        steps, progress = _record(steps, len(prepared.plan.steps), progress)
    with open_engine(bundle, DENOISER) as engine, _decoder(bundle, open_engine) as decode:
        comparison = compare(
            engine, prepared.plan, steps, select=prepared.select, decode=decode, progress=progress
        )
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
        load_transformer(source, "float32", recorded_loras(bundle.provenance.loras)),
        prepared.plan,
        prepared.latents,
        prepared.conditioning,
        select=prepared.select,
        anneal=prepared.anneal,
    )
    if floor:
        steps = with_floor(steps, prepared.plan, partial(open_eager(source), bundle, DENOISER))
    yield from steps


def _record(
    steps: Iterator[ReferenceStep], total: int, progress: Progress | None
) -> tuple[Iterator[ReferenceStep], Progress | None]:
    """All steps now, and progress that goes on after them: recording, then both runs of a comparison."""
    recorded = []
    for step in steps:
        recorded.append(step)
        if progress is not None:
            progress(len(recorded), 3 * total)
    if progress is None:
        return iter(recorded), None
    told = progress  # the closure's own, which is not None
    return iter(recorded), lambda done, both: told(total + done, total + both)


@contextmanager
def _encoder(bundle: Bundle, open_engine: EngineOpener) -> Iterator[Encode]:
    """The bundle's text encoders, or what stands in for them."""
    with ExitStack() as stack:
        if not _has_encoders(bundle):
            yield random_encoder(bundle)
            return
        names = [name for name in components_of(bundle) if name.startswith("text_encoder")]
        engines: dict[str, Engine] = {
            name: stack.enter_context(open_engine(home_of(bundle, name), name)) for name in names
        }
        yield PromptEncoder(
            engines,
            load_tokenizers(bundle),
            text_dim=bundle.contract.text_dim,
            max_sequence_length=bundle.defaults.max_sequence_length,
        ).encode


def random_encoder(bundle: Bundle) -> Encode:
    """Standard normal embeddings in place of text encoders: the same prompt always gets the same numbers.

    A denoiser is not told apart from its reference by what the text means, only by whether every input
    matters to both alike, for which noise serves.

    Args:
        bundle: Gives widths, and the number of tokens its text encoders would give.
    """
    contract = bundle.contract
    tokens = bundle.clip_tokens + bundle.defaults.max_sequence_length

    def encode(prompts: Sequence[str]) -> Encoded:
        generators = [torch.Generator().manual_seed(_seed(prompt)) for prompt in prompts]
        return Encoded(
            embeds=torch.stack([torch.randn(tokens, contract.text_dim, generator=g) for g in generators]),
            pooled=torch.stack([torch.randn(contract.pooled_dim, generator=g) for g in generators]),
            cut=(Cut(),) * len(prompts),
        )

    return encode


def _seed(prompt: str) -> int:
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:7])


@contextmanager
def _decoder(bundle: Bundle, open_engine: EngineOpener) -> Iterator[Decode | None]:
    if "vae_decoder" not in components_of(bundle):
        yield None
        return
    home = home_of(bundle, "vae_decoder")
    config = home.config("vae_decoder")
    with open_engine(home, "vae_decoder") as decoder:
        yield lambda latents: decode_latents(decoder, config, latents)


def _has_encoders(bundle: Bundle) -> bool:
    return set(_ENCODERS) <= set(components_of(bundle))


def _embeddings(bundle: Bundle, prepared: Prepared) -> str:
    tokens = prepared.conditioning.embeds.shape[1]
    if _has_encoders(bundle):
        return f"the bundle's text encoders, {tokens} tokens"
    return (
        f"random (standard normal, seeded by each prompt), {tokens} tokens: the bundle has no text encoders"
    )
