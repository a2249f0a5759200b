"""What families and hard negatives share: a denoiser cut into embed, blocks and head, and its attention."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

__all__ = ["Attend", "Blocks", "Flow", "Heads", "numbers", "plain"]


@dataclass(frozen=True, kw_only=True)
class Heads:
    """One self- or joint attention, behind norms and rotations, image tokens first.

    Attention does not care about the order, the moving averages do: where a model puts text first, its family
    puts it last.
    """

    query: Float[Tensor, "rows heads tokens head_dim"]
    key: Float[Tensor, "rows heads tokens head_dim"]
    value: Float[Tensor, "rows heads tokens head_dim"]
    image_tokens: int | torch.SymInt
    bias: Float[Tensor, "rows 1 1 tokens"] | None = None
    """Added to the scores: 0, or minus infinity for keys that a row must not see; see
    :mod:`emag_export.families.masks`."""


Attend = Callable[[Heads], Tensor]
"""Heads to the attention of every row, [rows, heads, tokens, head_dim]."""


def plain(heads: Heads) -> Float[Tensor, "rows heads tokens head_dim"]:
    """Attention as the model was trained with.

    Args:
        heads: Queries, keys and values.
    """
    return scaled_dot_product_attention(heads.query, heads.key, heads.value, attn_mask=heads.bias)


@dataclass(frozen=True, kw_only=True)
class Flow:
    """What goes from block to block."""

    rows: Mapping[str, Tensor]
    """Per row, gathered at the fork: hidden states of image and text, embedded time."""
    shared: Mapping[str, Any] = field(default_factory=dict)
    """The same for all rows: the grid of image tokens, tables."""

    def __getitem__(self, name: str) -> Any:
        return self.rows[name] if name in self.rows else self.shared[name]

    def with_rows(self, **rows: Tensor) -> "Flow":
        """The same with some tensors exchanged.

        Args:
            **rows: By name.
        """
        return replace(self, rows={**self.rows, **rows})

    def gather(self, index: Int[Tensor, " branch"]) -> "Flow":
        """The rows that continue behind the fork, in their order.

        Args:
            index: Trunk row of every branch row.
        """
        return replace(self, rows={name: tensor.index_select(0, index) for name, tensor in self.rows.items()})


def numbers(weight: Tensor) -> Tensor:
    """The numbers of a weight, which an export leaves unread until they are written.

    A family that looks at what a weight holds must ask for it here.

    Args:
        weight: Of the model.
    """
    read = getattr(weight, "read_stored", None)
    return weight if read is None else read()


@runtime_checkable
class Blocks(Protocol):
    """A family's denoiser, cut where the fork needs it; the model keeps its weights and is not changed."""

    @property
    def num_blocks(self) -> int:
        """Number of blocks, counted as ``contract.blocks`` counts them."""

    @property
    def streams(self) -> tuple[str, ...]:
        """Rows of the flow that a block changes: what goes on as it came where a block is left out."""

    @property
    def constants(self) -> Mapping[str, Tensor]:
        """Tables that torch computes once, so that no other library has to: ``embed`` gets them by name."""

    def embed(self, inputs: Mapping[str, Tensor]) -> Flow:
        """The trunk rows' flow into the first block, from the graph's inputs and :attr:`constants`.

        Args:
            inputs: By name.
        """

    def block(self, index: int, flow: Flow, attend: Attend) -> Flow:
        """One block; its self- or joint attention is ``attend``'s.

        Args:
            index: Of the block, from 0.
            flow: Into it.
            attend: Called with what the block attends with.
        """

    def head(self, flow: Flow) -> Float[Tensor, "rows channels *sides"]:
        """The prediction, in the shape of the latents and with the sign and scale that the contract names.

        Args:
            flow: Behind the last block.
        """
