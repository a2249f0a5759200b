"""Z-Image, cut into embed, blocks and head; diffusers' own forward, with the attention handed in.

Image and caption are one stream, the image first. Either is filled up to a multiple of 32 tokens with one
that was learned and is attended like any other; behind a caption's own fillers come tokens that a mask hides.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF, ZImageTransformer2DModel
from jaxtyping import Float, Int
from torch import Tensor

from emag_export.errors import ModelError
from emag_export.families.heads import split_heads
from emag_export.families.masks import hide_padding
from emag_export.families.packed import PATCH
from emag_export.families.packing import grid_of
from emag_export.families.protocol import Attend, Flow, Heads, plain
from emag_export.families.rotary import grid_rows, rotate

__all__ = ["ZImageBlocks", "blocks"]

_SIZES = f"{PATCH}-1"
"""What the model calls its embedding of patches of 2 x 2 latents of one frame."""

_AXES = ("caption", "height", "width")
"""Of positions: the place in the caption, which an image stands behind, and two in the image."""

_Turns = tuple[Tensor, Tensor]
"""Cosines and sines of every token, [rows, 1, tokens, head_dim / 2]."""


@dataclass(frozen=True, kw_only=True)
class _Stream:
    """What goes into one of the model's layers."""

    hidden: Float[Tensor, "rows tokens width"]
    turns: _Turns
    time: Float[Tensor, "rows time_width"] | None = None
    """None in layers that are not modulated."""
    bias: Float[Tensor, "rows 1 1 tokens"] | None = None
    image_tokens: int | torch.SymInt = 0


class ZImageBlocks:
    """Uses the weights of ``model``, which it neither copies nor changes.

    Args:
        model: The diffusers transformer, in eval mode.

    Raises:
        ModelError: If it knows no patches of 2 x 2 latents.
    """

    streams = ("hidden",)
    """Rows that a block changes."""

    def __init__(self, model: ZImageTransformer2DModel) -> None:
        if _SIZES not in model.all_x_embedder:
            raise ModelError(
                f"the transformer has the patches {', '.join(model.all_x_embedder)}, wanted is {_SIZES}; "
                "give another model"
            )
        self._model: Any = model
        self.num_blocks: int = len(model.layers)
        self.constants: Mapping[str, Tensor] = {
            name: table.to(model.device) for name, table in (_tables(model) | _frequencies(model)).items()
        }

    def embed(self, inputs: Mapping[str, Tensor]) -> Flow:
        """Both halves of the stream through their own refiners, and joined."""
        model, latents = self._model, inputs["hidden_states"]
        grid = grid_of(latents)
        time = self._time(inputs).to(latents.dtype)
        image = _filled(model.all_x_embedder[_SIZES](_pack(latents)), model.x_pad_token)
        text, mask = (inputs[name] for name in ("encoder_hidden_states", "encoder_hidden_states_mask"))
        text, mask = (
            _filled(text, torch.zeros_like(text[:1, :1])),
            _filled(mask, torch.zeros_like(mask[:1, :1])),
        )
        words = torch.where(mask[..., None] > 0, model.cap_embedder(text), model.cap_pad_token)
        seen = _with_fillers(mask)
        over_image = self._image_turns(inputs, grid, seen.sum(dim=1) + 1)
        over_words = self._caption_turns(inputs, text.shape[1])
        for layer in model.noise_refiner:
            image = _layer(layer, _Stream(hidden=image, turns=over_image, time=time), plain)
        bias = hide_padding(seen, latents.dtype)
        for layer in model.context_refiner:
            words = _layer(layer, _Stream(hidden=words, turns=over_words, bias=bias), plain)
        rows = latents.shape[0]
        cos, sin = (
            torch.cat([i, w.expand(rows, -1, -1, -1)], 2) for i, w in zip(over_image, over_words, strict=True)
        )
        joined = {"hidden": torch.cat([image, words], dim=1), "time": time, "cos": cos, "sin": sin}
        joined["bias"] = hide_padding(seen, latents.dtype, image.shape[1])
        return Flow(rows=joined, shared={"grid": grid})

    def block(self, index: int, flow: Flow, attend: Attend) -> Flow:
        """One block with sandwich norms and gates (arXiv:2511.22699, section 3)."""
        stream = _Stream(
            hidden=flow["hidden"],
            turns=(flow["cos"], flow["sin"]),
            time=flow["time"],
            bias=flow["bias"],
            image_tokens=math.prod(flow["grid"]),
        )
        return flow.with_rows(hidden=_layer(self._model.layers[index], stream, attend))

    def head(self, flow: Flow) -> Float[Tensor, "rows channels height width"]:
        """The velocity, of which the model predicts the negative."""
        tokens = flow["hidden"][:, : math.prod(flow["grid"])]
        return -_unpack(self._model.all_final_layer[_SIZES](tokens, c=flow["time"]), flow["grid"])

    def _time(self, inputs: Mapping[str, Tensor]) -> Float[Tensor, "rows width"]:
        """The model's time runs from 0, noise, to 1."""
        time, embedder = (1000 - inputs["timestep"]) / 1000, self._model.t_embedder
        angles = (time * self._model.t_scale)[:, None] * inputs["frequencies"]
        waves = torch.cat([angles.cos(), angles.sin()], dim=1)
        embedded: Tensor = embedder.mlp(waves.to(embedder.mlp[0].weight.dtype))
        return embedded

    def _image_turns(
        self, inputs: Mapping[str, Tensor], grid: tuple[int, int], start: Int[Tensor, " rows"]
    ) -> _Turns:
        """An image stands behind its own caption, whose fillers count; its own fillers are at the origin."""
        found = []
        for part in ("cos", "sin"):
            caption, height, width = (inputs[f"{axis}_{part}"] for axis in _AXES)
            sides = grid_rows(height[: grid[0]], width[: grid[1]])
            tokens = torch.cat(
                [
                    caption.index_select(0, start)[:, None].expand(-1, sides.shape[0], -1),
                    sides[None].expand(start.shape[0], -1, -1),
                ],
                dim=-1,
            )
            origin = torch.cat([caption[:1], height[:1], width[:1]], dim=-1)
            found.append(_filled(tokens, origin)[:, None])
        return found[0], found[1]

    def _caption_turns(self, inputs: Mapping[str, Tensor], text: int) -> _Turns:
        """A caption's first token is at 1."""
        found = []
        for part in ("cos", "sin"):
            caption, height, width = (inputs[f"{axis}_{part}"] for axis in _AXES)
            origin = torch.cat([height[:1], width[:1]], dim=-1).expand(text, -1)
            found.append(torch.cat([caption[1 : text + 1], origin], dim=-1)[None, None])
        return found[0], found[1]


def blocks(model: ZImageTransformer2DModel) -> ZImageBlocks:
    """The blocks of a diffusers model; see :class:`~emag_export.families.protocol.Blocks`."""
    return ZImageBlocks(model)


def _tables(model: ZImageTransformer2DModel) -> dict[str, Tensor]:
    """Real and imaginary parts of the model's own tables, [positions, half of the axis' width]."""
    rope = model.rope_embedder
    found: dict[str, Tensor] = {}
    tables = rope.precompute_freqs_cis(rope.axes_dims, rope.axes_lens, theta=rope.theta)
    for axis, table in zip(_AXES, tables, strict=True):
        found[f"{axis}_cos"], found[f"{axis}_sin"] = table.real.contiguous(), table.imag.contiguous()
    return found


def _frequencies(model: ZImageTransformer2DModel) -> dict[str, Tensor]:
    """Radians per unit of time of every sinusoid, as ``TimestepEmbedder`` computes them.

    :mod:`emag_export.families.sinusoids` says why they are no part of the graph.
    """
    half = model.t_embedder.frequency_embedding_size // 2
    exponents = -math.log(10000) * torch.arange(half, dtype=torch.float32) / half
    return {"frequencies": exponents.exp()}


def _filled(tokens: Tensor, filler: Tensor) -> Tensor:
    """Tokens [rows, tokens, ...], and behind them as many fillers as make a multiple of 32.

    There are always 31 of them, of which the first ones stay: a tracer takes a number that may be 0 for one
    that is.
    """
    whole = (tokens.shape[1] + SEQ_MULTI_OF - 1) // SEQ_MULTI_OF * SEQ_MULTI_OF
    fillers = filler.expand(tokens.shape[0], SEQ_MULTI_OF - 1, *tokens.shape[2:])
    return torch.cat([tokens, fillers], dim=1)[:, :whole]


def _with_fillers(mask: Int[Tensor, "rows text"]) -> Int[Tensor, "rows text"]:
    """The mask of a caption and its fillers: of every 32 tokens that begin with a real one, all."""
    groups = mask.unflatten(1, (-1, SEQ_MULTI_OF))
    kept: Tensor = groups[:, :, :1].expand(-1, -1, SEQ_MULTI_OF).flatten(1, 2)
    return kept


def _layer(layer: Any, stream: _Stream, attend: Attend) -> Float[Tensor, "rows tokens width"]:
    """One of the model's layers, in a refiner or the trunk."""
    hidden, attn = stream.hidden, layer.attention
    scale: Any = 1
    gate: Any = 1
    scale_mlp: Any = 1
    gate_mlp: Any = 1
    if stream.time is not None:
        modulation = layer.adaLN_modulation(stream.time).unsqueeze(1)
        scale, gate, scale_mlp, gate_mlp = modulation.chunk(4, dim=2)
        scale, gate, scale_mlp, gate_mlp = 1 + scale, gate.tanh(), 1 + scale_mlp, gate_mlp.tanh()
    heads = _heads(attn, layer.attention_norm1(hidden) * scale, stream)
    attended = attn.to_out[0](attend(heads).transpose(1, 2).flatten(2, 3))
    hidden = hidden + gate * layer.attention_norm2(attended)
    after = layer.feed_forward(layer.ffn_norm1(hidden) * scale_mlp)
    turned: Tensor = hidden + gate_mlp * layer.ffn_norm2(after)
    return turned


def _heads(attn: Any, normed: Float[Tensor, "rows tokens width"], stream: _Stream) -> Heads:
    heads = attn.heads
    return Heads(
        query=rotate(split_heads(attn.to_q(normed), heads, attn.norm_q), *stream.turns),
        key=rotate(split_heads(attn.to_k(normed), heads, attn.norm_k), *stream.turns),
        value=split_heads(attn.to_v(normed), heads),
        image_tokens=stream.image_tokens,
        bias=stream.bias,
    )


def _pack(latents: Float[Tensor, "rows channels height width"]) -> Float[Tensor, "rows tokens packed"]:
    """Tokens row by row; in each its patch, row by row, and of every latent its channels."""
    patches: Tensor = latents.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))  # rows channels h 2 w 2
    tokens: Tensor = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    return tokens


def _unpack(
    tokens: Float[Tensor, "rows tokens packed"], grid: tuple[int, int]
) -> Float[Tensor, "rows channels height width"]:
    """The inverse of :func:`_pack`."""
    cells: Tensor = tokens.unflatten(2, (PATCH, PATCH, -1)).unflatten(1, grid)  # rows h w 2 2 channels
    latents: Tensor = cells.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
    return latents
