"""From a prompt to pictures, on the graphs of a bundle."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Self

from jaxtyping import Float
from torch import Tensor

from emag_export.bundle import DENOISER, Bundle
from emag_export.engines.protocol import Engine
from emag_export.errors import InputError
from emag_export.runtime.loop import DenoiseStep, denoise
from emag_export.runtime.pictures.decode import Pictures, decode_latents
from emag_export.runtime.prepare import Prepared, cads_annealer, initial_noise, prepare
from emag_export.runtime.request import GenerationRequest
from emag_export.runtime.sampling.state import StatePool
from emag_export.runtime.text.encode import Encoded, PromptEncoder, load_tokenizers
from emag_export.shared_encoders import components_of, home_of

__all__ = ["EngineOpener", "Pictures", "Pipeline", "Prepared", "cads_annealer", "initial_noise"]

EngineOpener = Callable[[Bundle, str], Engine]
"""(bundle, component) to a running engine."""

_NEEDED = (DENOISER, "text_encoder", "text_encoder_2", "vae_decoder")


class Pipeline:
    """Text encoders, denoiser and decoder of one bundle, opened together and closed together.

    Args:
        bundle: Made by ``build``.
        open_engine: Makes an engine of a component; decides backend and device.
        max_sequence_length: Tokens of the T5 part, at most the bundle's; None takes the bundle's.

    Raises:
        InputError: If there are more tokens than the bundle was made for, or a component is not there.
    """

    def __init__(
        self, bundle: Bundle, open_engine: EngineOpener, *, max_sequence_length: int | None = None
    ) -> None:
        tokens = _text_tokens(bundle, max_sequence_length)
        if missing := [name for name in _NEEDED if name not in components_of(bundle)]:
            raise InputError(
                f"{bundle.path} has no {', '.join(missing)}, which pictures need: build it without "
                "--components, or share those of another bundle with --encoders"
            )
        self.bundle = bundle
        self._stack = ExitStack()
        self._states = StatePool()
        with ExitStack() as stack:
            engines = {
                name: stack.enter_context(open_engine(home_of(bundle, name), name))
                for name in components_of(bundle)
            }
            self._stack = stack.pop_all()
        self.denoiser = engines.pop(DENOISER)
        self._decoder = engines.pop("vae_decoder")
        self._vae = home_of(bundle, "vae_decoder").config("vae_decoder")
        self._encoder = PromptEncoder(
            engines,
            load_tokenizers(bundle),
            text_dim=bundle.contract.text_dim,
            max_sequence_length=tokens,
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
        return prepare(self.bundle, requests, self.encode, self.denoiser.device)

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
        """Latents on any device to 8-bit sRGB pictures on the host; see :func:`decode_latents`."""
        return decode_latents(self._decoder, self._vae, latents)


def _text_tokens(bundle: Bundle, asked: int | None) -> int:
    most = bundle.defaults.max_sequence_length
    if asked is None:
        return most
    if not 1 <= asked <= most:
        raise InputError(
            f"max_sequence_length is {asked}, {bundle.path} was made for 1 to {most} tokens: "
            "give a number in that range, or none"
        )
    return asked
