"""The forked SD3 denoiser: one module, one call, the numbers of the released two-pass algorithm.

Below the first candidate block the perturbed row *is* the conditional row, outside the perturb
window the perturbed prediction *is* the conditional one, and the unconditional half of a perturbed
pass is thrown away. So rows ``[u, c]`` run through the trunk, ``branch_rows`` forks them into
``[u, c, p]``, and only those run through the rest.
"""

import math

import torch
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import CombinedTimestepTextProjEmbeddings, PatchEmbed
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from emag_export.contract import DenoiserContract, Renorm, Variant
from emag_export.exporter.graph.attention import EmaAttention, JointHeads, Tracking, ema_attention

__all__ = ["ForkedSD3", "embed_time"]


class ForkedSD3(nn.Module):
    """SD3 or SD3.5 with the state of EMAG as arguments and results; weights are shared with ``model``.

    Args:
        model: The diffusers transformer. It is used, not copied, and not changed.
        contract: Which blocks are candidates and what is averaged.
    """

    frequencies: Float[Tensor, " half"]

    def __init__(self, model: SD3Transformer2DModel, contract: DenoiserContract) -> None:
        super().__init__()
        self.model = model
        self.contract = contract
        self.register_buffer("frequencies", _frequencies(model), persistent=False)

    def forward(
        self,
        hidden_states: Float[Tensor, "trunk_rows in_channels height width"],
        timestep: Float[Tensor, " trunk_rows"],
        encoder_hidden_states: Float[Tensor, "trunk_rows text text_dim"],
        pooled_projections: Float[Tensor, "trunk_rows pooled_dim"],
        branch_rows: Int[Tensor, " rows"],
        ema_state: Float[Tensor, "tracked layers *state"],
        ema_step: Float[Tensor, " tracked"],
        layer_mask: Float[Tensor, "tracked layers"],
    ) -> tuple[
        Float[Tensor, "rows out_channels height width"],
        Float[Tensor, "tracked layers *state"],
        Float[Tensor, "tracked layers"],
    ]:
        """Predict the velocity of every branch row and advance the averages of the tracked ones.

        Args:
            hidden_states: Latents of the trunk rows.
            timestep: 1000 sigma per trunk row; rows may be at different steps.
            encoder_hidden_states: Text embeddings of the trunk rows.
            pooled_projections: Pooled text embeddings of the trunk rows.
            branch_rows: Trunk row that each branch row continues; the last ``tracked`` are tracked.
            ema_state: Moving averages, one per tracked row and candidate block.
            ema_step: a per tracked row.
            layer_mask: lambda per tracked row and candidate block.

        Returns:
            ``noise_pred``, ``ema_state_out``, ``layer_delta``.
        """
        model, contract = self.model, self.contract
        grid = (hidden_states.shape[2] // contract.patch_size, hidden_states.shape[3] // contract.patch_size)
        hidden = patch_embed(model.pos_embed, hidden_states, grid)
        temb = embed_time(model.time_text_embed, self.frequencies, timestep, pooled_projections)
        text = model.context_embedder(encoder_hidden_states)

        for block in model.transformer_blocks[: contract.fork]:
            hidden, text, _ = _joint_block(block, hidden, text, temb)

        hidden, text, temb = (x.index_select(0, branch_rows) for x in (hidden, text, temb))
        rows, tracked = branch_rows.shape[0], ema_state.shape[0]
        tracked_rows = torch.arange(rows - tracked, rows, device=branch_rows.device)
        averages: list[Tensor] = []
        deltas: list[Tensor] = []
        for index in range(contract.fork, contract.num_blocks):
            tracking = None
            if index in contract.blocks:
                layer = contract.blocks.index(index)
                tracking = Tracking(
                    rows=tracked_rows,
                    average=ema_state[:, layer],
                    step=ema_step,
                    strength=layer_mask[:, layer],
                )
            hidden, text, ema = self._block(index, hidden, text, temb, tracking)
            if ema is not None:
                averages += ema.average
                deltas.append(ema.delta)

        hidden = model.proj_out(model.norm_out(hidden, temb))
        noise_pred = _unpatchify(hidden, grid, contract.patch_size)
        state = torch.cat(averages, dim=1).unflatten(1, (len(contract.blocks), contract.heads))
        return noise_pred, state, torch.stack(deltas, dim=1)

    def _block(
        self, index: int, hidden: Tensor, text: Tensor, temb: Tensor, tracking: Tracking | None
    ) -> tuple[Tensor, Tensor, EmaAttention | None]:
        block = self.model.transformer_blocks[index]
        variant, renorm = self.contract.variant, self.contract.renorm
        return _joint_block(block, hidden, text, temb, tracking, variant=variant, renorm=renorm)


def _frequencies(model: SD3Transformer2DModel) -> Float[Tensor, " half"]:
    """Radians per unit of timestep of every sinusoid, float32, computed by torch on the CPU.

    Left in the graph, their exponential is folded by the exporter with numpy, 1.8e-7 away from torch's: at
    timestep 1000 that is 6e-5 rad.
    """
    projection = model.time_text_embed.time_proj
    half = projection.num_channels // 2
    shift = projection.downscale_freq_shift
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32) / (half - shift)
    frequencies: Tensor = projection.scale * exponent.exp()
    return frequencies.to(model.device)


def embed_time(
    embed: CombinedTimestepTextProjEmbeddings,
    frequencies: Float[Tensor, " half"],
    timestep: Float[Tensor, " rows"],
    pooled: Float[Tensor, "rows pooled_dim"],
) -> Float[Tensor, "rows width"]:
    """Embed timestep and pooled text like diffusers, with the frequencies given; angles are float32."""
    angles = timestep[:, None].float() * frequencies
    waves = [angles.cos(), angles.sin()] if embed.time_proj.flip_sin_to_cos else [angles.sin(), angles.cos()]
    time: Tensor = embed.timestep_embedder(torch.cat(waves, dim=1).to(pooled.dtype))
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


def _joint_block(
    block: JointTransformerBlock,
    hidden: Tensor,
    text: Tensor,
    temb: Tensor,
    tracking: Tracking | None = None,
    *,
    variant: Variant = Variant.EMAG_Q,
    renorm: Renorm = Renorm.ROW,
) -> tuple[Tensor, Tensor, EmaAttention | None]:
    """One MMDiT block; like diffusers' own, with the attention of candidate blocks exchanged."""
    image_tokens = hidden.shape[1]
    if block.use_dual_attention:
        normed, gate, shift_mlp, scale_mlp, gate_mlp, normed2, gate2 = block.norm1(hidden, emb=temb)
    else:
        normed, gate, shift_mlp, scale_mlp, gate_mlp = block.norm1(hidden, emb=temb)
    if block.context_pre_only:
        normed_text = block.norm1_context(text, temb)
    else:
        normed_text, text_gate, text_shift, text_scale, text_gate_mlp = block.norm1_context(text, emb=temb)

    heads = _joint_heads(block.attn, normed, normed_text)
    if tracking is None:
        ema = None
        attended = scaled_dot_product_attention(heads.query, heads.key, heads.value)
    else:
        ema = ema_attention(heads, tracking, variant=variant, renorm=renorm)
        attended = ema.hidden
    attended = attended.transpose(1, 2).flatten(2, 3)

    hidden = hidden + gate[:, None] * block.attn.to_out[0](attended[:, :image_tokens])
    if block.use_dual_attention:
        hidden = hidden + gate2[:, None] * block.attn2(hidden_states=normed2)
    modulated = block.norm2(hidden) * (1 + scale_mlp[:, None]) + shift_mlp[:, None]
    hidden = hidden + gate_mlp[:, None] * block.ff(modulated)
    if block.context_pre_only:
        return hidden, text, ema

    text = text + text_gate[:, None] * block.attn.to_add_out(attended[:, image_tokens:])
    modulated = block.norm2_context(text) * (1 + text_scale[:, None]) + text_shift[:, None]
    return hidden, text + text_gate_mlp[:, None] * block.ff_context(modulated), ema


def _joint_heads(attn: Attention, hidden: Tensor, text: Tensor) -> JointHeads:
    def split(projected: Tensor, norm: nn.Module | None) -> Tensor:
        heads: Tensor = projected.unflatten(2, (attn.heads, -1)).transpose(1, 2)
        return heads if norm is None else norm(heads)

    def joint(image: Tensor, text: Tensor) -> Tensor:
        return torch.cat([image, text], dim=2)

    return JointHeads(
        query=joint(split(attn.to_q(hidden), attn.norm_q), split(attn.add_q_proj(text), attn.norm_added_q)),
        key=joint(split(attn.to_k(hidden), attn.norm_k), split(attn.add_k_proj(text), attn.norm_added_k)),
        value=joint(split(attn.to_v(hidden), None), split(attn.add_v_proj(text), None)),
        image_tokens=hidden.shape[1],
    )
