"""From a prompt to pictures, on the graphs of a bundle."""

from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self, Unpack

from jaxtyping import Float
from torch import Tensor

from emag_export.bundle import DENOISER, Bundle
from emag_export.engines.config import EngineConfig, EngineKeywords
from emag_export.engines.registry import EngineOpener, open_backend
from emag_export.errors import InputError
from emag_export.families.texts import Encoded
from emag_export.kinds import Variant
from emag_export.runtime.keywords import SamplingKeywords, request_for
from emag_export.runtime.loop import DenoiseStep, denoise
from emag_export.runtime.pictures.decode import Pictures, decode_latents
from emag_export.runtime.pictures.metadata import Picture, make_picture
from emag_export.runtime.pictures.preview import preview_factors
from emag_export.runtime.prepare import Prepared, prepare
from emag_export.runtime.request import GenerationRequest
from emag_export.runtime.sampling.pool import StatePool
from emag_export.runtime.stream import StreamStep, previews_of
from emag_export.runtime.text.prompts import PromptEncoder, load_tokenizers
from emag_export.shared_encoders import components_of, home_of

__all__ = ["Pictures", "Pipeline", "Prepared"]


class Pipeline:
    """Text encoders, denoiser and decoder of one bundle, opened together and closed together.

    :meth:`generate` and :meth:`stream` are all that most callers need; :meth:`prepare`, :meth:`denoise` and
    :meth:`decode` are what they are made of. One thread at a time may use it; several share a
    :class:`~emag_export.runtime.batching.pipeline.BatchedPipeline`.

    Args:
        bundle: Made by ``build``.
        open_engine: Makes an engine of a component; decides backend and device.
        max_sequence_length: Tokens of the text, at most the bundle's; None takes the bundle's.

    Raises:
        InputError: If there are more tokens than the bundle was made for, or a component is not there.

    Examples:
        >>> import emag_export as emag
        >>> with emag.Pipeline.open("bundle") as pipeline:
        ...     pipeline.denoiser.name, pipeline.bundle.defaults.guidance
        ('onnxruntime (cpu)', 'emag')
    """

    def __init__(
        self, bundle: Bundle, open_engine: EngineOpener, *, max_sequence_length: int | None = None
    ) -> None:
        tokens = _text_tokens(bundle, max_sequence_length)
        if missing := [name for name in bundle.family.needed if name not in components_of(bundle)]:
            raise InputError(
                f"{bundle.path} has no {', '.join(missing)}, which pictures need: build it without "
                "`components`, or share those of another bundle with `encoders`"
            )
        self.bundle = bundle
        self._open_engine = open_engine
        self._stack = ExitStack()
        self._states = StatePool()
        with ExitStack() as stack:
            engines = {
                name: stack.enter_context(open_engine(home_of(bundle, name), name))
                for name in components_of(bundle)
            }
            self._stack = stack.pop_all()
        self.denoiser = engines.pop(DENOISER)
        decoder = bundle.family.decoder
        self._decoder = engines.pop(decoder)
        self._latents = bundle.family.latents(home_of(bundle, decoder).config(decoder))
        self._encoder = PromptEncoder(
            engines,
            load_tokenizers(bundle),
            contract=bundle.contract,
            max_sequence_length=tokens,
            labels=bundle.labels,
        )

    @classmethod
    def open(
        cls,
        bundle: Bundle | Path | str,
        *,
        variant: Variant | str | None = None,
        max_sequence_length: int | None = None,
        **engine: Unpack[EngineKeywords],
    ) -> Self:
        """Open every component of a bundle on one backend.

        Args:
            bundle: The folder that ``build`` wrote.
            variant: Refuse a bundle of another one.
            max_sequence_length: Tokens of the text, at most the bundle's; None takes the bundle's.
            **engine: Fields of :class:`~emag_export.engines.config.EngineConfig`: ``backend``, ``device`` …

        Returns:
            The pipeline; close it, or use it in a ``with``.

        Raises:
            BundleError: If it is no bundle, or damaged.
            InputError: If an option does not fit.
            EngineError: If a component does not load.
            MissingDependencyError: If the backend's module is absent.

        Examples:
            >>> import emag_export as emag
            >>> with emag.Pipeline.open("bundle", backend="onnxruntime", device="cpu", threads=1) as pipeline:
            ...     str(pipeline.bundle.contract.variant)
            'emag-q'
            >>> emag.Pipeline.open("bundle", variant="skip")
            Traceback (most recent call last):
                ...
            emag_export.errors.InputError: bundle holds the variant emag-q, skip was asked for; build it: ...
        """
        if unknown := [name for name in engine if name not in EngineKeywords.__annotations__]:
            known = ", ".join(("variant", "max_sequence_length", *EngineKeywords.__annotations__))
            raise InputError(f"there is no keyword {unknown[0]!r}; there are {known}")
        opened = bundle if isinstance(bundle, Bundle) else Bundle(bundle)
        opened.require_variant(variant)
        opener = open_backend(EngineConfig(**engine), opened)
        return cls(opened, opener, max_sequence_length=max_sequence_length)

    def reopen_denoiser(self) -> None:
        """Open the denoiser again, for instance after it failed; the old one is closed first.

        Raises:
            EngineError: If it does not load.
            BundleError: If a file of it has changed.
        """
        self.denoiser.close()
        self.denoiser = self._stack.enter_context(self._open_engine(home_of(self.bundle, DENOISER), DENOISER))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free all engines; leaving a ``with`` does."""
        self._states.clear()
        self._stack.close()

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        images: int = 1,
        batch_size: int = 4,
        **sampling: Unpack[SamplingKeywords],
    ) -> list[Picture]:
        """Draw pictures.

        Args:
            prompt: One or several.
            images: Per prompt; their seeds count up.
            batch_size: Pictures per engine call.
            **sampling: ``guidance``, ``seed``, ``steps`` …, of :class:`SamplingKeywords`.

        Returns:
            PIL images, prompt by prompt, that remember their parameters and write them into PNGs.

        Raises:
            InputError: If a keyword or value cannot be used.
            EngineError: If an engine fails, or a picture is NaN or infinite.

        Examples:
            >>> import emag_export as emag
            >>> with emag.Pipeline.open("bundle") as pipeline:
            ...     pictures = pipeline.generate("a yellow ring", images=2, seed=1, guidance="cfg", steps=4)
            >>> [picture.size for picture in pictures], pictures[0].info["Description"]
            ([(64, 64), (64, 64)], 'a yellow ring')
        """
        requests = self._requests(prompt, images, sampling)
        pictures: list[Picture] = []
        for start in range(0, len(requests), batch_size):
            prepared = self.prepare(requests[start : start + batch_size])
            *_, last = self.denoise(prepared)
            pictures += self._pictures(prepared, last.latents)
        return pictures

    def stream(
        self,
        prompt: str | Sequence[str],
        *,
        images: int = 1,
        previews: bool = False,
        **sampling: Unpack[SamplingKeywords],
    ) -> Generator[StreamStep, None, None]:
        """Draw pictures in one batch, yielding after every step; the last step has them.

        A generator: leave its ``for``, or close it, to stop early. Nothing is done before the first ``next``.

        Args:
            prompt: One or several.
            images: Per prompt; their seeds count up.
            previews: Show in every step what the pictures are likely to be.
            **sampling: ``guidance``, ``seed``, ``steps`` …, of :class:`SamplingKeywords`.

        Yields:
            Every finished step.

        Raises:
            InputError: If a keyword or value cannot be used.
            BundleError: If previews are asked for and the bundle has none.
            EngineError: If an engine fails, or a picture is NaN or infinite.

        Examples:
            >>> import emag_export as emag
            >>> with emag.Pipeline.open("bundle") as pipeline:
            ...     for step in pipeline.stream("a small yellow ring", previews=True, steps=4):
            ...         print(step.index, step.previews[0].size, len(step.images))
            0 (64, 64) 0
            1 (64, 64) 0
            2 (64, 64) 0
            3 (64, 64) 1
        """
        factors = preview_factors(self.bundle) if previews else None
        prepared = self.prepare(self._requests(prompt, images, sampling))
        first, steps = prepared.requests[0], len(prepared.plan.steps)
        with closing(self.denoise(prepared)) as run:
            for step in run:
                last = step.plan.index == steps - 1
                yield StreamStep(
                    index=step.plan.index,
                    steps=steps,
                    latents=step.latents,
                    previews=()
                    if factors is None
                    else previews_of(step, factors, height=first.height, width=first.width),
                    images=tuple(self._pictures(prepared, step.latents)) if last else (),
                )

    def _requests(
        self, prompt: str | Sequence[str], images: int, sampling: SamplingKeywords
    ) -> list[GenerationRequest]:
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts or images < 1:
            raise InputError(f"{len(prompts)} prompts with {images} pictures each is nothing to draw")
        bases = [request_for(self.bundle, text, sampling) for text in prompts]
        return [replace(base, seed=base.seed + offset) for base in bases for offset in range(images)]

    def _pictures(self, prepared: Prepared, latents: Tensor) -> list[Picture]:
        return [
            make_picture(pixels, self.bundle, request, self.denoiser.name)
            for pixels, request in zip(self.decode(latents), prepared.requests, strict=True)
        ]

    def encode(self, prompts: Sequence[str]) -> Encoded:
        """Embed prompts; those that were embedded lately are remembered.

        Args:
            prompts: Text, or classes where the model is prompted by class.

        Returns:
            Tensors by name in ``contract.conditioning``, one row per prompt, and what was too long.

        Raises:
            InputError: If a prompt is no class of the model.
            EngineError: If a text encoder fails.

        Examples:
            >>> import emag_export as emag
            >>> with emag.Pipeline.open("bundle") as pipeline:
            ...     encoded = pipeline.encode(["a small yellow ring", ""])
            >>> {name: tuple(tensor.shape) for name, tensor in encoded.tensors.items()}
            {'encoder_hidden_states': (2, 40, 128), 'pooled_projections': (2, 112)}
        """
        return self._encoder.encode(prompts)

    def prepare(self, requests: Sequence[GenerationRequest]) -> Prepared:
        """Encode prompts, draw noise and plan; everything before the first step.

        Args:
            requests: May differ in prompt, negative prompt and seed only: the batch runs in step.

        Returns:
            Plan, initial latents and conditioning, on the denoiser's device.

        Raises:
            InputError: If the requests cannot share a batch, or do not fit the bundle.

        Examples:
            >>> import emag_export as emag
            >>> from emag_export.runtime.request import default_request
            >>> with emag.Pipeline.open("bundle") as pipeline:
            ...     prepared = pipeline.prepare([default_request(pipeline.bundle, "a small yellow ring")])
            >>> tuple(prepared.latents.shape), len(prepared.plan.steps)
            ((1, 8, 16, 16), 28)
        """
        return prepare(self.bundle, requests, self.encode, self.denoiser.device)

    def denoise(self, prepared: Prepared) -> Generator[DenoiseStep, None, None]:
        """Run the loop, yielding after every step.

        The averages lie in buffers that the pipeline lends and takes back at the end of the run: those of a
        step's ``run`` are its caller's only until the next step, and the last one's until the next run.

        Args:
            prepared: Of :meth:`prepare`.

        Yields:
            Every finished step; the last one holds the finished latents.

        Raises:
            EngineError: If the engine fails.

        Examples:
            >>> import emag_export as emag
            >>> from emag_export.runtime.keywords import request_for
            >>> with emag.Pipeline.open("bundle") as pipeline:
            ...     request = request_for(pipeline.bundle, "a small yellow ring", {"steps": 4, "seed": 1})
            ...     for step in pipeline.denoise(pipeline.prepare([request])):
            ...         print(step.plan.phase, tuple(step.latents.shape))
            track (1, 8, 16, 16)
            guide (1, 8, 16, 16)
            guide (1, 8, 16, 16)
            plain (1, 8, 16, 16)
        """
        plan, given = prepared.plan, prepared.conditioning
        with self._states.lend(plan.contract, prepared.latents, given.given) as start:
            yield from denoise(
                self.denoiser, plan, start, given, anneal=prepared.anneal, noise=prepared.noise
            )

    def decode(self, latents: Float[Tensor, "images channels latent_height latent_width"]) -> Pictures:
        """Finished latents to pictures.

        Args:
            latents: As the denoiser has them, on any device.

        Returns:
            8-bit sRGB on the host, ``[images, height, width, 3]``.

        Raises:
            EngineError: If the decoder fails, or a picture is NaN or infinite.

        Examples:
            >>> import emag_export as emag, torch
            >>> with emag.Pipeline.open("bundle") as pipeline:
            ...     pixels = pipeline.decode(torch.zeros(2, 8, 16, 16))
            >>> pixels.shape, pixels.dtype
            ((2, 64, 64, 3), dtype('uint8'))
        """
        return decode_latents(self._decoder, self._latents, latents)


def _text_tokens(bundle: Bundle, asked: int | None) -> int:
    most = bundle.defaults.max_sequence_length
    if asked is None:
        return most
    if not most:
        raise InputError(f"{bundle.path} takes no text; leave out `max_sequence_length`")
    if not 1 <= asked <= most:
        raise InputError(
            f"max_sequence_length is {asked}, {bundle.path} was made for 1 to {most} tokens: "
            "give a number in that range, or none"
        )
    return asked
