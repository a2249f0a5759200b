"""Prompts to conditioning, on the exported text encoders and the checkpoint's own tokenizers."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from emag_export.bundle import Bundle
from emag_export.contract import DenoiserContract
from emag_export.engines.protocol import Engine
from emag_export.errors import BundleError
from emag_export.families import family_of
from emag_export.families.texts import Encoded
from emag_export.labels import ClassLabels
from emag_export.shared_encoders import home_of

__all__ = ["CACHED_PROMPTS", "PromptEncoder", "load_tokenizers"]


def load_tokenizers(bundle: Bundle) -> dict[str, Any]:
    """Tokenizers of a bundle, keyed by the text encoder they feed; their files are checked first."""
    if not bundle.family.tokenizers:
        return {}
    from transformers import AutoTokenizer

    tokenizers: dict[str, Any] = {}
    for encoder, folder in bundle.family.tokenizers.items():
        home = home_of(bundle, folder)
        if (home.path / folder).is_dir():
            home.check(f"{folder}/")
            tokenizers[encoder] = AutoTokenizer.from_pretrained(home.path / folder, local_files_only=True)
    return tokenizers


CACHED_PROMPTS = 32
"""Prompts whose embeddings are kept; those of SD3, for example, take 2.7 MB each in half precision."""


class PromptEncoder:
    """Text encoders of a bundle, put together as the model's family does it.

    Every prompt is encoded in a call of its own, because the size of a batch changes how matrix products
    round: so its embeddings are the same in any company, and the same when they come from the cache.

    Engines may run on different devices; embeddings lie on that of the first.

    Args:
        engines: By name of the text encoder.
        tokenizers: By name of the text encoder.
        contract: Of the denoiser that the embeddings are for.
        max_sequence_length: Tokens of the part of the text whose length can be chosen.
        labels: Classes that prompts name, where they are no text.
        cached: Prompts to keep, the least recently used go first; 0 keeps none.
    """

    def __init__(
        self,
        engines: Mapping[str, Engine],
        tokenizers: Mapping[str, Any],
        *,
        contract: DenoiserContract,
        max_sequence_length: int,
        labels: ClassLabels | None = None,
        cached: int = CACHED_PROMPTS,
    ) -> None:
        self.contract = contract
        self.max_sequence_length = max_sequence_length
        self.labels = labels
        self._engines = engines
        self._tokenizers = tokenizers
        self._cached = cached
        self._cache: OrderedDict[str, Encoded] = OrderedDict()

    def encode(self, prompts: Sequence[str]) -> Encoded:
        """Embed prompts; those already known run no encoder.

        Args:
            prompts: At least one.

        Returns:
            Tensors of the caller's own: changing them changes nothing here.
        """
        found = {prompt: self._cached_or_new(prompt) for prompt in dict.fromkeys(prompts)}
        rows = [found[prompt] for prompt in prompts]
        return Encoded(
            tensors={name: torch.cat([row.tensors[name] for row in rows]) for name in rows[0].tensors},
            cut=tuple(row.cut[0] for row in rows),
        )

    def _cached_or_new(self, prompt: str) -> Encoded:
        encoded = self._cache.pop(prompt, None)
        if encoded is None:
            encoded = family_of(self.contract).part("prompt").encode(prompt, self)
        self._cache[prompt] = encoded
        while len(self._cache) > self._cached:
            self._cache.popitem(last=False)
        return encoded

    def has(self, encoder: str) -> bool:
        """See :class:`~emag_export.families.texts.Texts`."""
        return encoder in self._engines

    def run(self, encoder: str, tokens: Tensor) -> Mapping[str, Tensor]:
        """See :class:`~emag_export.families.texts.Texts`."""
        engine, device = self._engines[encoder], next(iter(self._engines.values())).device
        outputs = engine.run({"input_ids": tokens.to(engine.device)})
        return {name: tensor.to(device) for name, tensor in outputs.items()}

    def tokens(self, encoder: str, prompt: str, limit: int | None = None) -> tuple[Tensor, str]:
        """See :class:`~emag_export.families.texts.Texts`."""
        tokenizer = self._tokenizers[encoder]
        limit = tokenizer.model_max_length if limit is None else limit
        tokens = tokenizer(
            [prompt],
            padding="max_length",
            padding_side="right",
            max_length=limit,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        whole = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
        room = limit - tokenizer.num_special_tokens_to_add()
        return tokens, tokenizer.decode(whole[room:]).strip()

    def message(self, encoder: str, prompt: str, limit: int) -> tuple[Tensor, str]:
        """See :class:`~emag_export.families.texts.Texts`.

        Raises:
            BundleError: If the tokenizer has no chat template.
        """
        tokenizer = self._tokenizers[encoder]
        if not tokenizer.chat_template:
            raise BundleError(
                f"the tokenizer of {encoder} has no chat template; take the model's own tokenizer, and "
                "build again"
            )
        said = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(
            said, tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        whole = tokenizer(text, verbose=False).input_ids
        cut, behind = tokenizer.decode(whole[limit:]), text[text.rfind(prompt) + len(prompt) :]
        unseen = "" if behind.endswith(cut) else cut.removesuffix(behind).strip()
        return torch.tensor([whole[:limit]]), unseen

    def length(self, encoder: str, prompt: str) -> int:
        """See :class:`~emag_export.families.texts.Texts`."""
        return len(self._tokenizers[encoder](prompt, verbose=False).input_ids)
