"""A whole bundle against the PyTorch reference: prompts in, comparison out.

Components are opened one after another, and the denoiser only where it fits: a full-size model takes a third
of a workstation's memory in float32, and its engine as much again.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch

from emag_export.bundle import DENOISER, Bundle
from emag_export.engines.registry import EngineOpener
from emag_export.exporter.eager import open_denoiser, source_of
from emag_export.exporter.source.load import load_recorded
from emag_export.families.source_model import SourceModel
from emag_export.progress import Event, Progress, silent
from emag_export.reference.compare import Decode, compare
from emag_export.reference.comparison import Comparison
from emag_export.reference.forced import with_floor
from emag_export.reference.memory import must_record
from emag_export.reference.two_pass import ReferenceStep, two_pass_denoise
from emag_export.runtime.pictures.decode import decode_latents
from emag_export.runtime.prepare import Prepared, prepare
from emag_export.runtime.request import GenerationRequest
from emag_export.runtime.text.encoders import has_encoders, opened_encoder
from emag_export.shared_encoders import components_of, home_of

__all__ = ["check_bundle"]

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
        floor: For a bundle in half precision, measure what PyTorch itself loses in that precision, too; for a
            quantised one, what becomes of c - p in both half precisions. Each costs as much as one more
            engine.
        progress: Told after every step.

    Raises:
        ModelError: If the source model is not at hand or is another one.
        InputError: If the requests do not fit the bundle, or the run does not fit into memory.
    """
    model = source_of(bundle, source)
    with opened_encoder(bundle, open_engine) as encode:
        prepared = prepare(bundle, requests, encode, _CPU)
    floors = _floors(bundle) if floor else ()
    steps = _reference(bundle, model, prepared, floors)
    recorded = must_record(bundle, prepared, floor=bool(floors))
    if recorded:
        steps, progress = _record(steps, len(prepared.plan.steps), progress)
    with open_engine(bundle, DENOISER) as engine, _decoder(bundle, open_engine) as decode:
        comparison = compare(
            engine,
            prepared.plan,
            steps,
            decode=decode,
            scheme=None if bundle.quantisation is None else bundle.quantisation.scheme,
            progress=progress,
        )
    settings = {
        **comparison.settings,
        "embeddings": _embeddings(bundle, prepared),
        "order": "reference recorded first, to save memory" if recorded else "side by side",
    }
    return replace(comparison, settings=settings)


def _reference(
    bundle: Bundle, source: SourceModel, prepared: Prepared, floors: Sequence[str]
) -> Iterator[ReferenceStep]:
    """Steps of the float32 model, with floors in these precisions.

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
    for precision in floors:
        contract = bundle.contract
        if precision != contract.precision:
            contract = bundle.family.contract_in(contract, bundle.config(DENOISER), precision)
        plan = replace(prepared.plan, contract=contract)
        open_floor = partial(open_denoiser, source, bundle.provenance, contract)
        steps = with_floor(steps, plan, open_floor, judges=bundle.quantisation is None)
    yield from steps


def _floors(bundle: Bundle) -> tuple[str, ...]:
    """Precisions in which PyTorch's own error is worth knowing."""
    if bundle.quantisation is not None:
        return ("float16", "bfloat16")
    precision = bundle.contract.precision
    return () if precision == "float32" else (precision,)


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
def _decoder(bundle: Bundle, open_engine: EngineOpener) -> Iterator[Decode | None]:
    family = bundle.family
    if family.decoder not in components_of(bundle):
        yield None
        return
    home = home_of(bundle, family.decoder)
    facts = family.latents(home.config(family.decoder))
    with open_engine(home, family.decoder) as decoder:
        # A broken picture is a figure of the comparison, not its end.
        yield lambda latents: decode_latents(decoder, facts, latents, refuse_broken=False)


def _embeddings(bundle: Bundle, prepared: Prepared) -> str:
    shapes = ", ".join(f"{n} {list(t.shape[1:])}" for n, t in prepared.conditioning.given.items())
    if bundle.labels is not None:
        return "none, prompts are classes"
    if has_encoders(bundle):
        return f"the bundle's text encoders: {shapes}"
    return f"random (standard normal, seeded by each prompt), the bundle has no text encoders: {shapes}"
