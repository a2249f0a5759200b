"""DiT, cut into embed, blocks and head; diffusers' own forward, with the attention handed in."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import silu

from emag_export.families.heads import split_heads
from emag_export.families.protocol import Attend, Flow, Heads, numbers
from emag_export.families.sinusoids import frequencies_of, waves_of

__all__ = ["DitBlocks", "blocks", "set_timestep_shift"]


class DitBlocks:
    """Uses the weights of ``model``, which it neither copies nor changes.

    Every block of diffusers' model has an embedding of time and class of its own; in published checkpoints
    all are copies of one. Equal ones, bit for bit, are computed once and stored once in a graph; a model
    with random weights has as many as it has blocks.

    Args:
        model: The diffusers transformer, in eval mode: in training its embedding drops labels.
    """

    streams = ("hidden",)
    """Rows that a block changes."""

    def __init__(self, model: DiTTransformer2DModel) -> None:
        self._model: Any = model
        self.num_blocks: int = model.config.num_layers
        self._projection = model.transformer_blocks[0].norm1.emb.time_proj
        self.constants: Mapping[str, Tensor] = {
            "frequencies": frequencies_of(self._projection).to(model.device)
        }
        self._patch: int = model.config.patch_size
        self._side: int = model.config.sample_size // self._patch
        self._embedding = _first_equal([block.norm1.emb for block in self._model.transformer_blocks])

    def embed(self, inputs: Mapping[str, Tensor]) -> Flow:
        """Patches with their positions; time and class by every embedding that differs from the others."""
        hidden = self._model.pos_embed(inputs["hidden_states"])
        waves = waves_of(self._projection, inputs["timestep"], inputs["frequencies"]).to(hidden.dtype)
        blocks = self._model.transformer_blocks
        embedded = {
            _name(first): _embed(blocks[first].norm1.emb, waves, inputs["class_labels"])
            for first in dict.fromkeys(self._embedding)
        }
        return Flow(rows={"hidden": hidden, **embedded}, shared={"grid": (self._side, self._side)})

    def block(self, index: int, flow: Flow, attend: Attend) -> Flow:
        """One block with adaLN-Zero (arXiv:2212.09748, figure 3)."""
        block, hidden = self._model.transformer_blocks[index], flow["hidden"]
        modulation = block.norm1.linear(silu(flow[_name(self._embedding[index])])).unsqueeze(1)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=2)
        attn = block.attn1
        heads = _heads(attn, block.norm1.norm(hidden) * (1 + scale) + shift)
        hidden = hidden + gate * attn.to_out[0](attend(heads).transpose(1, 2).flatten(2, 3))
        modulated = block.norm3(hidden) * (1 + scale_mlp) + shift_mlp
        return flow.with_rows(hidden=hidden + gate_mlp * block.ff(modulated))

    def head(self, flow: Flow) -> Float[Tensor, "rows out_channels height width"]:
        """Epsilon, and behind it the variance where the model learned one."""
        model = self._model
        modulation = model.proj_out_1(silu(flow[_name(0)])).unsqueeze(1)
        shift, scale = modulation.chunk(2, dim=2)
        tokens = model.proj_out_2(model.norm_out(flow["hidden"]) * (1 + scale) + shift)
        cells: Tensor = tokens.unflatten(2, (self._patch, self._patch, -1)).unflatten(1, flow["grid"])
        return cells.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def blocks(model: DiTTransformer2DModel) -> DitBlocks:
    """The blocks of a diffusers model; see :class:`~emag_export.families.protocol.Blocks`."""
    return DitBlocks(model)


def set_timestep_shift(model: DiTTransformer2DModel, shift: float) -> None:
    """Let a model embed time with other frequencies: 10000^(-i / (128 - shift)).

    diffusers' DiT has the shift 1, the released one 0, with the same weights. At t = 999 the cosine between
    the two embeddings is 0.49, at t = 10 it is 1.00.

    Args:
        model: It is changed, and so are its pictures.
        shift: In units of one frequency.
    """
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = shift


def _first_equal(embeddings: Sequence[nn.Module]) -> tuple[int, ...]:
    """For every embedding the index of the first one with the same bits."""
    firsts: list[int] = []
    for embedding in embeddings:
        same = (first for first in dict.fromkeys(firsts) if _equal(embeddings[first], embedding))
        firsts.append(next(same, len(firsts)))
    return tuple(firsts)


def _equal(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(numbers(a), numbers(b)) for a, b in pairs)


def _name(index: int) -> str:
    return f"embedded_{index}"


def _embed(
    embedding: Any, waves: Float[Tensor, "rows waves"], labels: Int[Tensor, " rows"]
) -> Float[Tensor, "rows width"]:
    embedded: Tensor = embedding.timestep_embedder(waves) + embedding.class_embedder(labels)
    return embedded


def _heads(attn: Any, normed: Float[Tensor, "rows tokens width"]) -> Heads:
    heads = attn.heads
    return Heads(
        query=split_heads(attn.to_q(normed), heads),
        key=split_heads(attn.to_k(normed), heads),
        value=split_heads(attn.to_v(normed), heads),
        image_tokens=normed.shape[1],
    )
