"""Flux.1, cut into embed, blocks and head; diffusers' own forward, with the attention handed in.

diffusers puts text in front of the image, here the image comes first: attention does not care.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from jaxtyping import Float
from torch import Tensor

from emag_export.families.flux import MAX_SIDE
from emag_export.families.packing import grid_of, pack, unpack
from emag_export.families.protocol import Attend, Flow, Heads
from emag_export.families.rotary import grid_rows, rotary_table, rotate
from emag_export.families.sinusoids import frequencies_of, waves_of

__all__ = ["FluxBlocks", "blocks"]

_GUIDANCE_UNIT = 1000
"""The model embeds a guidance scale as it embeds time, in thousandths."""


class FluxBlocks:
    """Uses the weights of ``model``, which it neither copies nor changes.

    Double blocks, with weights of their own for image and text, come first, then single ones, with one set.

    Args:
        model: The diffusers transformer.
    """

    streams = ("image", "text")
    """Rows that a block changes."""

    def __init__(self, model: FluxTransformer2DModel) -> None:
        self._model: Any = model
        self._double: int = model.config.num_layers
        self.num_blocks: int = model.config.num_layers + model.config.num_single_layers
        self._embeds_guidance: bool = model.config.guidance_embeds
        still, height, width = model.config.axes_dims_rope
        # The first axis is 0 for every token, and all three are for text: cosine 1, sine 0.
        self._still: int = still // 2
        tables = {"height": height, "width": width}
        made = {side: rotary_table(MAX_SIDE, dims, theta=10000) for side, dims in tables.items()}
        self.constants: Mapping[str, Tensor] = {
            "frequencies": frequencies_of(model.time_text_embed.time_proj).to(model.device),
            **{f"cos_{side}": cos.to(model.device) for side, (cos, _) in made.items()},
            **{f"sin_{side}": sin.to(model.device) for side, (_, sin) in made.items()},
        }

    def embed(self, inputs: Mapping[str, Tensor]) -> Flow:
        """Packed latents, projected text, and time, guidance and pooled text in one vector."""
        model, latents = self._model, inputs["hidden_states"]
        grid = grid_of(latents)
        return Flow(
            rows={
                "image": model.x_embedder(pack(latents)),
                "text": model.context_embedder(inputs["encoder_hidden_states"]),
                "temb": self._embed_time(inputs),
            },
            shared={
                "grid": grid,
                "cos": self._rope(inputs, "cos", grid),
                "sin": self._rope(inputs, "sin", grid),
            },
        )

    def block(self, index: int, flow: Flow, attend: Attend) -> Flow:
        """One block, double or single."""
        if index < self._double:
            return _double(self._model.transformer_blocks[index], flow, attend)
        return _single(self._model.single_transformer_blocks[index - self._double], flow, attend)

    def head(self, flow: Flow) -> Float[Tensor, "rows out_channels height width"]:
        """The velocity."""
        tokens = self._model.proj_out(self._model.norm_out(flow["image"], flow["temb"]))
        return unpack(tokens, flow["grid"])

    def _embed_time(self, inputs: Mapping[str, Tensor]) -> Float[Tensor, "rows width"]:
        """As diffusers does, but angles are float32 whatever the precision."""
        embed, pooled = self._model.time_text_embed, inputs["pooled_projections"]
        frequencies = inputs["frequencies"]
        time = waves_of(embed.time_proj, inputs["timestep"], frequencies).to(pooled.dtype)
        embedded: Tensor = embed.timestep_embedder(time)
        if self._embeds_guidance:
            scale = waves_of(embed.time_proj, inputs["guidance"] * _GUIDANCE_UNIT, frequencies)
            embedded = embedded + embed.guidance_embedder(scale.to(pooled.dtype))
        text: Tensor = embed.text_embedder(pooled)
        return embedded + text

    def _rope(
        self, inputs: Mapping[str, Tensor], name: str, grid: tuple[int, int]
    ) -> Float[Tensor, "tokens half"]:
        """Cosines or sines of the image tokens."""
        sides = zip(("height", "width"), grid, strict=True)
        over_height, over_width = (
            inputs[f"{name}_{side}"].index_select(0, torch.arange(size, device=inputs["timestep"].device))
            for side, size in sides
        )
        turning = grid_rows(over_height, over_width)
        still = turning.new_full((1, self._still), 1.0 if name == "cos" else 0.0)
        return torch.cat([still.expand(turning.shape[0], -1), turning], dim=1)


def blocks(model: FluxTransformer2DModel) -> FluxBlocks:
    """The blocks of a diffusers model; see :class:`~emag_export.families.protocol.Blocks`."""
    return FluxBlocks(model)


def _double(block: Any, flow: Flow, attend: Attend) -> Flow:
    image, text, temb, attn = flow["image"], flow["text"], flow["temb"], block.attn
    tokens = image.shape[1]
    normed, gate, shift_mlp, scale_mlp, gate_mlp = block.norm1(image, emb=temb)
    normed_text, text_gate, text_shift, text_scale, text_gate_mlp = block.norm1_context(text, emb=temb)
    words = (attn.add_q_proj(normed_text), attn.add_k_proj(normed_text), attn.add_v_proj(normed_text))
    word_heads = _normed(attn, words, attn.norm_added_q, attn.norm_added_k)
    query, key, value = _normed(attn, _projected(attn, normed), attn.norm_q, attn.norm_k)
    turned = (_turned(query, flow), _turned(key, flow), value)
    joint = [torch.cat(pair, dim=2) for pair in zip(turned, word_heads, strict=True)]

    attended = _attended(attend, joint, tokens)

    image = image + gate[:, None] * attn.to_out[0](attended[:, :tokens])
    modulated = block.norm2(image) * (1 + scale_mlp[:, None]) + shift_mlp[:, None]
    image = image + gate_mlp[:, None] * block.ff(modulated)
    text = text + text_gate[:, None] * attn.to_add_out(attended[:, tokens:])
    modulated = block.norm2_context(text) * (1 + text_scale[:, None]) + text_shift[:, None]
    text = text + text_gate_mlp[:, None] * block.ff_context(modulated)
    return flow.with_rows(image=image, text=_clipped(text))


def _single(block: Any, flow: Flow, attend: Attend) -> Flow:
    """Attention and feed-forward side by side, on image and text as one sequence."""
    tokens, attn = flow["image"].shape[1], block.attn
    both = torch.cat([flow["image"], flow["text"]], dim=1)
    normed, gate = block.norm(both, emb=flow["temb"])
    query, key, value = _normed(attn, _projected(attn, normed), attn.norm_q, attn.norm_k)

    attended = _attended(attend, [_turned(query, flow), _turned(key, flow), value], tokens)

    forward = block.act_mlp(block.proj_mlp(normed))
    both = both + gate[:, None] * block.proj_out(torch.cat([attended, forward], dim=2))
    both = _clipped(both)
    return flow.with_rows(image=both[:, :tokens], text=both[:, tokens:])


def _projected(attn: Any, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return attn.to_q(normed), attn.to_k(normed), attn.to_v(normed)


def _normed(
    attn: Any, projected: tuple[Tensor, Tensor, Tensor], norm_query: Any, norm_key: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value by heads, behind the norms of the first two."""
    query, key, value = (x.unflatten(2, (-1, attn.head_dim)).transpose(1, 2) for x in projected)
    return norm_query(query), norm_key(key), value


def _turned(heads: Tensor, flow: Flow) -> Tensor:
    """Image tokens turned by their places; text, where there is some behind them, is at place 0."""
    tokens = flow["image"].shape[1]
    image = rotate(heads[:, :, :tokens], flow["cos"], flow["sin"])
    return torch.cat([image, heads[:, :, tokens:]], dim=2)


def _attended(attend: Attend, joint: list[Tensor], tokens: int) -> Float[Tensor, "rows tokens width"]:
    query, key, value = joint
    hidden: Tensor = attend(Heads(query=query, key=key, value=value, image_tokens=tokens))
    return hidden.transpose(1, 2).flatten(2, 3)


def _clipped(hidden: Tensor) -> Tensor:
    """Kept within what float16 holds, as diffusers does."""
    return hidden.clip(-65504, 65504) if hidden.dtype == torch.float16 else hidden
