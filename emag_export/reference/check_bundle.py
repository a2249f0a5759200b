"""A whole bundle against the PyTorch reference: prompts in, comparison out."""

from collections.abc import Sequence

from emag_export.bundle import Bundle
from emag_export.exporter.components import load_transformer
from emag_export.exporter.eager import source_of
from emag_export.reference.compare import Progress, compare
from emag_export.reference.comparison import Comparison
from emag_export.reference.two_pass import two_pass_denoise
from emag_export.runtime.pipeline import EngineOpener, Pipeline
from emag_export.runtime.request import GenerationRequest

__all__ = ["check_bundle"]


def check_bundle(
    bundle: Bundle,
    open_engine: EngineOpener,
    requests: Sequence[GenerationRequest],
    *,
    model: str | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Compare a bundle's denoiser with two full passes of the model it was made from.

    Both sides get the same embeddings and the same noise, and the bundle's own decoder makes the pictures
    of both, so what differs is the denoiser. The reference is float32 whatever the bundle's precision.

    Args:
        bundle: To check.
        open_engine: Decides backend and device.
        requests: One per image; they run as one batch.
        model: Where the source model is now, if it has moved.
        progress: Told after every step.

    Raises:
        ModelError: If the source model is not at hand or is another one.
    """
    source = source_of(bundle, model)
    with Pipeline(bundle, open_engine) as pipeline:
        prepared = pipeline.prepare(requests)
        reference = two_pass_denoise(
            load_transformer(source, "float32"),
            prepared.plan,
            prepared.latents,
            prepared.conditioning,
            select=prepared.select,
            anneal=prepared.anneal,
        )
        return compare(
            pipeline.denoiser,
            prepared.plan,
            reference,
            select=prepared.select,
            decode=pipeline.decode,
            progress=progress,
        )
