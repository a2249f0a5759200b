"""SD3 and SD3.5, cut into embed, blocks and head; diffusers' own forward, with the attention handed in."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import CombinedTimestepTextProjEmbeddings, PatchEmbed
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from jaxtyping import Float
from torch import Tensor

from emag_export.families.heads import joint, split_heads
from emag_export.families.protocol import Attend, Flow, Heads
from emag_export.families.sinusoids import frequencies_of, waves_of

__all__ = ["Sd3Blocks", "blocks", "embed_time"]


class Sd3Blocks:
    """Uses the weights of ``model``, which it neither copies nor changes.

    Args:
        model: The diffusers transformer.
    """

    def __init__(self, model: SD3Transformer2DModel) -> None:
        self._model: Any = model
        self.num_blocks: int = model.config.num_layers
        self.streams = ("image", "text")
        self.constants: Mapping[str, Tensor] = {
            "frequencies": frequencies_of(model.time_text_embed.time_proj).to(model.device)
        }
        self._patch: int = model.config.patch_size

    def embed(self, inputs: Mapping[str, Tensor]) -> Flow:
        """Patches with their positions, projected text, embedded time and pooled text."""
        model, latents = self._model, inputs["hidden_states"]
        grid = (latents.shape[2] // self._patch, latents.shape[3] // self._patch)
        image = patch_embed(model.pos_embed, latents, grid)
        temb = embed_time(
            model.time_text_embed, inputs["frequencies"], inputs["timestep"], inputs["pooled_projections"]
        )
        text = model.context_embedder(inputs["encoder_hidden_states"])
        return Flow(rows={"image": image, "text": text, "temb": temb}, shared={"grid": grid})

    def block(self, index: int, flow: Flow, attend: Attend) -> Flow:
        """One MMDiT block (arXiv:2403.03206, figure 2); the last one makes no text."""
        block = self._model.transformer_blocks[index]
        image, text, temb = flow["image"], flow["text"], flow["temb"]
        image_tokens = image.shape[1]
        if block.use_dual_attention:
            normed, gate, shift_mlp, scale_mlp, gate_mlp, normed2, gate2 = block.norm1(image, emb=temb)
        else:
            normed, gate, shift_mlp, scale_mlp, gate_mlp = block.norm1(image, emb=temb)
        if block.context_pre_only:
            normed_text = block.norm1_context(text, temb)
        else:
            normed_text, text_gate, text_shift, text_scale, text_gate_mlp = block.norm1_context(
                text, emb=temb
            )

        attended = attend(_joint_heads(block.attn, normed, normed_text)).transpose(1, 2).flatten(2, 3)

        image = image + gate[:, None] * block.attn.to_out[0](attended[:, :image_tokens])
        if block.use_dual_attention:
            image = image + gate2[:, None] * block.attn2(hidden_states=normed2)
        modulated = block.norm2(image) * (1 + scale_mlp[:, None]) + shift_mlp[:, None]
        image = image + gate_mlp[:, None] * block.ff(modulated)
        if block.context_pre_only:
            return flow.with_rows(image=image)

        text = text + text_gate[:, None] * block.attn.to_add_out(attended[:, image_tokens:])
        modulated = block.norm2_context(text) * (1 + text_scale[:, None]) + text_shift[:, None]
        return flow.with_rows(image=image, text=text + text_gate_mlp[:, None] * block.ff_context(modulated))

    def head(self, flow: Flow) -> Float[Tensor, "rows out_channels height width"]:
        """The velocity."""
        tokens = self._model.proj_out(self._model.norm_out(flow["image"], flow["temb"]))
        return _unpatchify(tokens, flow["grid"], self._patch)


def blocks(model: SD3Transformer2DModel) -> Sd3Blocks:
    """The blocks of a diffusers model; see :class:`~emag_export.families.protocol.Blocks`."""
    return Sd3Blocks(model)


def embed_time(
    embed: CombinedTimestepTextProjEmbeddings,
    frequencies: Float[Tensor, " half"],
    timestep: Float[Tensor, " rows"],
    pooled: Float[Tensor, "rows pooled_dim"],
) -> Float[Tensor, "rows width"]:
    """Embed timestep and pooled text like diffusers, with the frequencies given; angles are float32."""
    waves = waves_of(embed.time_proj, timestep, frequencies)
    time: Tensor = embed.timestep_embedder(waves.to(pooled.dtype))
    text: Tensor = embed.text_embedder(pooled)
    return time + text


def patch_embed(embed: PatchEmbed, latents: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patchify and add the centre crop of the positional embedding, for even and odd grids alike.

    diffusers starts the crop at ``(side - size) // 2``. Traced with symbolic sizes, its floor division of
    what may be negative becomes a truncating one, which is wrong for odd grids; here nothing negative is
    divided. The start is part of the range and not added to it: onnxruntime keeps sizes on the CPU and
    ranges on the GPU, and a node that joins the two needs a copy, which no CUDA graph can hold.
    """
    tokens = embed.proj(latents).flatten(2).transpose(1, 2)
    side = embed.pos_embed_max_size
    table = embed.pos_embed.reshape(side, side, -1)
    for axis, size in enumerate(grid):
        start = side // 2 - (size + 1 - side % 2) // 2
        table = table.index_select(axis, torch.arange(start, start + size, device=latents.device))
    positioned: Tensor = tokens + table.flatten(0, 1).to(tokens.dtype)
    return positioned


def _unpatchify(tokens: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    height, width = grid
    cells: Tensor = tokens.unflatten(2, (patch, patch, -1)).unflatten(1, (height, width))
    return cells.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def _joint_heads(attn: Attention, hidden: Tensor, text: Tensor) -> Heads:
    heads = attn.heads
    return Heads(
        query=joint(
            split_heads(attn.to_q(hidden), heads, attn.norm_q),
            split_heads(attn.add_q_proj(text), heads, attn.norm_added_q),
        ),
        key=joint(
            split_heads(attn.to_k(hidden), heads, attn.norm_k),
            split_heads(attn.add_k_proj(text), heads, attn.norm_added_k),
        ),
        value=joint(split_heads(attn.to_v(hidden), heads), split_heads(attn.add_v_proj(text), heads)),
        image_tokens=hidden.shape[1],
    )
