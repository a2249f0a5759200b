"""Text encoders of a bundle, without a pipeline around them; or random numbers in place of what they say."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from emag_export.bundle import Bundle
from emag_export.contract import GUIDANCE_INPUT, TensorSpec
from emag_export.engines.protocol import TORCH_DTYPES, Engine
from emag_export.engines.registry import EngineOpener
from emag_export.families.masks import random_mask
from emag_export.families.texts import Cut, Encoded
from emag_export.runtime.prepare import Encode
from emag_export.runtime.text.prompts import PromptEncoder, load_tokenizers
from emag_export.shapes import Sizes, evaluate
from emag_export.shared_encoders import components_of, home_of

__all__ = ["has_encoders", "opened_encoder", "random_encoder"]


def has_encoders(bundle: Bundle) -> bool:
    """Whether the bundle, or the one it shares with, has what a prompt needs."""
    needed = {name for name in bundle.family.needed if name in bundle.family.tokenizers}
    return needed <= set(components_of(bundle))


@contextmanager
def opened_encoder(bundle: Bundle, open_engine: EngineOpener) -> Iterator[Encode]:
    """The bundle's text encoders, or what stands in for them; open within the ``with``.

    Args:
        bundle: Whose prompts are encoded.
        open_engine: Decides backend and device.
    """
    with ExitStack() as stack:
        if not has_encoders(bundle):
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
