"""Prompts to embeddings, on the exported text encoders and the checkpoint's own tokenizers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from emag_export.bundle import Bundle
from emag_export.engines.protocol import Engine

__all__ = ["Encoded", "PromptEncoder", "load_tokenizers"]

_TOKENIZERS = {"tokenizer": "text_encoder", "tokenizer_2": "text_encoder_2", "tokenizer_3": "text_encoder_3"}


def load_tokenizers(bundle: Bundle) -> dict[str, Any]:
    """Tokenizers of a bundle, keyed by the text encoder they feed; their files are checked first."""
    from transformers import AutoTokenizer

    tokenizers = {}
    for folder, encoder in _TOKENIZERS.items():
        if (bundle.path / folder).is_dir():
            bundle.check(f"{folder}/")
            tokenizers[encoder] = AutoTokenizer.from_pretrained(bundle.path / folder, local_files_only=True)
    return tokenizers


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Prompts as the denoiser takes them, and what did not fit."""

    embeds: Float[Tensor, "prompts text text_dim"]
    pooled: Float[Tensor, "prompts pooled_dim"]
    cut: tuple[str, ...]
    """Per prompt the text beyond the tokenizers' limit; empty where everything fitted."""


class PromptEncoder:
    """CLIP, CLIP and, where present, T5, put together as SD3 was trained.

    Engines may run on different devices; embeddings lie on that of the first.

    Args:
        engines: By name of the text encoder.
        tokenizers: By name of the text encoder.
        text_dim: Width of the denoiser's text input.
        max_sequence_length: Tokens of the T5 part; zeros where there is no T5.
    """

    def __init__(
        self,
        engines: Mapping[str, Engine],
        tokenizers: Mapping[str, Any],
        *,
        text_dim: int,
        max_sequence_length: int,
    ) -> None:
        self._engines = engines
        self._tokenizers = tokenizers
        self._text_dim = text_dim
        self._max_sequence_length = max_sequence_length

    def encode(self, prompts: Sequence[str]) -> Encoded:
        """Embed prompts.

        Source:
            ``StableDiffusion3Pipeline.encode_prompt`` of diffusers, whose result this equals.
        """
        states, pooled, cut = [], [], [""] * len(prompts)
        for name in ("text_encoder", "text_encoder_2"):
            limit = self._tokenizers[name].model_max_length
            tokens, cut = self._tokenize(name, prompts, limit)
            output = self._run(name, tokens)
            states.append(output["penultimate_hidden_state"])
            pooled.append(output["text_embeds"])
        clip = torch.cat(states, dim=-1)
        clip = torch.nn.functional.pad(clip, (0, self._text_dim - clip.shape[-1]))
        return Encoded(
            embeds=torch.cat([clip, self._t5(prompts, clip)], dim=1),
            pooled=torch.cat(pooled, dim=-1),
            cut=tuple(cut),
        )

    def _t5(self, prompts: Sequence[str], like: Tensor) -> Tensor:
        if "text_encoder_3" not in self._engines:
            return like.new_zeros(len(prompts), self._max_sequence_length, self._text_dim)
        tokens, _ = self._tokenize("text_encoder_3", prompts, self._max_sequence_length)
        return self._run("text_encoder_3", tokens)["last_hidden_state"].to(like.dtype)

    def _run(self, name: str, tokens: Tensor) -> dict[str, Tensor]:
        engine, device = self._engines[name], self._engines["text_encoder"].device
        outputs = engine.run({"input_ids": tokens.to(engine.device)})
        return {name: tensor.to(device) for name, tensor in outputs.items()}

    def _tokenize(self, name: str, prompts: Sequence[str], limit: int) -> tuple[Tensor, list[str]]:
        tokenizer = self._tokenizers[name]
        tokens = tokenizer(
            list(prompts), padding="max_length", max_length=limit, truncation=True, return_tensors="pt"
        ).input_ids
        cut = []
        for prompt in prompts:
            whole = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
            room = limit - tokenizer.num_special_tokens_to_add()
            cut.append(tokenizer.decode(whole[room:]).strip())
        return tokens, cut
