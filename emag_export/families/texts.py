"""What a family and the runtime talk about when a prompt becomes conditioning."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import Tensor

from emag_export.contract import DenoiserContract
from emag_export.labels import ClassLabels

__all__ = ["Cut", "Encoded", "Texts"]


@dataclass(frozen=True, kw_only=True)
class Cut:
    """What of one prompt was beyond the text encoders' limits. False where every encoder saw all of it."""

    unseen: Mapping[str, str] = field(default_factory=dict)
    """Label of an encoder to the text that it did not see, empty where it saw all."""

    def __bool__(self) -> bool:
        return any(self.unseen.values())

    def __str__(self) -> str:
        """The longest text that an encoder did not see."""
        return max(self.unseen.values(), key=len, default="")

    def describe(self) -> str:
        """Which encoder did not see what, for people."""
        parts = [f"{name} did not see “{text}”" for name, text in self.unseen.items() if text]
        saw_all = [f"{name} saw all of it" for name, text in self.unseen.items() if not text]
        return "; ".join(part for part in (" and ".join(parts), " and ".join(saw_all)) if part)


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Prompts as the denoiser takes them, and what did not fit."""

    tensors: Mapping[str, Tensor]
    """By name in ``contract.conditioning``, one row per prompt."""
    cut: tuple[Cut, ...]
    """Per prompt."""


@runtime_checkable
class Texts(Protocol):
    """What one bundle makes conditioning of: tokenizers and text encoders, or classes."""

    @property
    def contract(self) -> DenoiserContract:
        """Of the denoiser that the embeddings are for."""

    @property
    def max_sequence_length(self) -> int:
        """Tokens of the part of the text whose length can be chosen."""

    @property
    def labels(self) -> ClassLabels | None:
        """The classes that prompts name; None where they are text."""

    def has(self, encoder: str) -> bool:
        """Whether the bundle has this text encoder."""

    def tokens(self, encoder: str, prompt: str, limit: int | None = None) -> tuple[Tensor, str]:
        """Token ids of a prompt, [1, limit], filled up on the right, and the text that did not fit.

        A limit of None is the tokenizer's own.
        """

    def length(self, encoder: str, prompt: str) -> int:
        """Tokens of a prompt, however many, without those that :meth:`tokens` fills up with."""

    def message(self, encoder: str, prompt: str, limit: int) -> tuple[Tensor, str]:
        """Token ids of a conversation, [1, up to limit], and the text of the prompt that did not fit.

        The conversation is as the tokenizer's chat template writes it: a user says the prompt, and the reply
        begins.
        """

    def run(self, encoder: str, tokens: Tensor) -> Mapping[str, Tensor]:
        """Outputs of a text encoder by name, all on one device."""
