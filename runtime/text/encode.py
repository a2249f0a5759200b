"""Prompts to embeddings, on the exported text encoders and the checkpoint's own tokenizers."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from emag_export.bundle import TOKENIZERS, Bundle
from emag_export.engines.protocol import Engine
from emag_export.shared_encoders import home_of

__all__ = ["CACHED_PROMPTS", "Cut", "Encoded", "PromptEncoder", "load_tokenizers"]


def load_tokenizers(bundle: Bundle) -> dict[str, Any]:
    """Tokenizers of a bundle, keyed by the text encoder they feed; their files are checked first."""
    from transformers import AutoTokenizer

    tokenizers = {}
    for encoder, folder in TOKENIZERS.items():
        home = home_of(bundle, folder)
        if (home.path / folder).is_dir():
            home.check(f"{folder}/")
            tokenizers[encoder] = AutoTokenizer.from_pretrained(home.path / folder, local_files_only=True)
    return tokenizers


CACHED_PROMPTS = 32
"""Prompts whose embeddings are kept; SD3's take 2.7 MB each in half precision."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """What of one prompt was beyond the encoders' limits. False where every encoder saw all of it."""

    clip: str = ""
    """Text that CLIP did not see."""
    t5: str | None = None
    """Text that T5 did not see, and so no encoder did; None where there is no T5."""

    def __bool__(self) -> bool:
        return bool(self.clip or self.t5)

    def __str__(self) -> str:
        """The longest text that an encoder did not see."""
        return max(self.clip, self.t5 or "", key=len)

    def describe(self) -> str:
        """Which encoder did not see what, for people."""
        if self.t5 is None:
            return f"CLIP did not see “{self.clip}”"
        parts = [
            f"{name} did not see “{text}”" for name, text in (("CLIP", self.clip), ("T5", self.t5)) if text
        ]
        return " and ".join(parts) + ("" if self.t5 else "; T5 saw all of it")


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Prompts as the denoiser takes them, and what did not fit."""

    embeds: Float[Tensor, "prompts text text_dim"]
    pooled: Float[Tensor, "prompts pooled_dim"]
    cut: tuple[Cut, ...]
    """Per prompt."""


class PromptEncoder:
    """CLIP, CLIP and, where present, T5, put together as SD3 was trained.

    Every prompt is encoded in a call of its own, because the size of a batch changes how matrix products
    round: so its embeddings are the same in any company, and the same when they come from the cache.

    Engines may run on different devices; embeddings lie on that of the first.

    Args:
        engines: By name of the text encoder.
        tokenizers: By name of the text encoder.
        text_dim: Width of the denoiser's text input.
        max_sequence_length: Tokens of the T5 part; zeros where there is no T5.
        cached: Prompts to keep, the least recently used go first; 0 keeps none.
    """

    def __init__(
        self,
        engines: Mapping[str, Engine],
        tokenizers: Mapping[str, Any],
        *,
        text_dim: int,
        max_sequence_length: int,
        cached: int = CACHED_PROMPTS,
    ) -> None:
        self._engines = engines
        self._tokenizers = tokenizers
        self._text_dim = text_dim
        self._max_sequence_length = max_sequence_length
        self._cached = cached
        self._cache: OrderedDict[str, Encoded] = OrderedDict()

    def encode(self, prompts: Sequence[str]) -> Encoded:
        """Embed prompts; those already known run no encoder.

        Args:
            prompts: At least one.

        Returns:
            Tensors of the caller's own: changing them changes nothing here.

        Source:
            ``StableDiffusion3Pipeline.encode_prompt`` of diffusers, whose result this equals.
        """
        found = {prompt: self._cached_or_new(prompt) for prompt in dict.fromkeys(prompts)}
        rows = [found[prompt] for prompt in prompts]
        return Encoded(
            embeds=torch.cat([row.embeds for row in rows]),
            pooled=torch.cat([row.pooled for row in rows]),
            cut=tuple(row.cut[0] for row in rows),
        )

    def _cached_or_new(self, prompt: str) -> Encoded:
        encoded = self._cache.pop(prompt, None) or self._encode(prompt)
        self._cache[prompt] = encoded
        while len(self._cache) > self._cached:
            self._cache.popitem(last=False)
        return encoded

    def _encode(self, prompt: str) -> Encoded:
        states, pooled, beyond_clip = [], [], ""
        for name in ("text_encoder", "text_encoder_2"):
            tokens, beyond_clip = self._tokenize(name, prompt, self._tokenizers[name].model_max_length)
            output = self._run(name, tokens)
            states.append(output["penultimate_hidden_state"])
            pooled.append(output["text_embeds"])
        clip = torch.cat(states, dim=-1)
        clip = torch.nn.functional.pad(clip, (0, self._text_dim - clip.shape[-1]))
        t5, beyond_t5 = self._t5(prompt, clip)
        cut = Cut(clip=beyond_clip, t5=beyond_t5)
        return Encoded(embeds=torch.cat([clip, t5], dim=1), pooled=torch.cat(pooled, dim=-1), cut=(cut,))

    def _t5(self, prompt: str, like: Tensor) -> tuple[Tensor, str | None]:
        if "text_encoder_3" not in self._engines:
            return like.new_zeros(1, self._max_sequence_length, self._text_dim), None
        tokens, beyond = self._tokenize("text_encoder_3", prompt, self._max_sequence_length)
        return self._run("text_encoder_3", tokens)["last_hidden_state"].to(like.dtype), beyond

    def _run(self, name: str, tokens: Tensor) -> dict[str, Tensor]:
        engine, device = self._engines[name], self._engines["text_encoder"].device
        outputs = engine.run({"input_ids": tokens.to(engine.device)})
        return {name: tensor.to(device) for name, tensor in outputs.items()}

    def _tokenize(self, name: str, prompt: str, limit: int) -> tuple[Tensor, str]:
        """Token ids of shape [1, limit], and the text that did not fit."""
        tokenizer = self._tokenizers[name]
        tokens = tokenizer(
            [prompt], padding="max_length", max_length=limit, truncation=True, return_tensors="pt"
        ).input_ids
        whole = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
        room = limit - tokenizer.num_special_tokens_to_add()
        return tokens, tokenizer.decode(whole[room:]).strip()
