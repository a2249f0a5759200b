"""Qwen-Image, cut into embed, blocks and head; diffusers' own forward, with the attention handed in."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel
from jaxtyping import Float
from torch import Tensor

from emag_export.families.heads import joint, split_heads
from emag_export.families.masks import hide_padding
from emag_export.families.packing import grid_of, pack, unpack
from emag_export.families.protocol import Attend, Flow, Heads
from emag_export.families.rotary import grid_rows, rotate

__all__ = ["QwenImageBlocks", "blocks"]

_FLOAT16_MAX = 65504.0
"""Where diffusers clips both streams behind every block, in float16 alone."""

Tables = tuple[Tensor, Tensor]
"""Cosines and sines."""


class QwenImageBlocks:
    """Uses the weights of ``model``, which it neither copies nor changes.

    Image tokens come first here and text behind them, where diffusers has it the other way round.

    Args:
        model: The diffusers transformer.
    """

    streams = ("image", "text")
    """Rows that a block changes."""

    def __init__(self, model: QwenImageTransformer2DModel) -> None:
        self._model: Any = model
        self.num_blocks: int = model.config.num_layers
        self._axes: list[int] = [width // 2 for width in model.config.axes_dims_rope]
        self._origin, cosine, sine = _rotations(model)
        self.constants: Mapping[str, Tensor] = {
            "frequencies": _frequencies(model),
            "cosine": cosine,
            "sine": sine,
        }

    def embed(self, inputs: Mapping[str, Tensor]) -> Flow:
        """Packed patches, normed and projected text, embedded time, rotations, and the mask as a bias."""
        model, latents = self._model, inputs["hidden_states"]
        grid = grid_of(latents)
        image = model.img_in(pack(latents))
        text = model.txt_in(model.txt_norm(inputs["encoder_hidden_states"]))
        bias = hide_padding(inputs["encoder_hidden_states_mask"], image.dtype, image.shape[1])
        time = _embed_time(model, inputs["frequencies"], inputs["timestep"], image.dtype)
        rotations = self._rotations(inputs, grid, text.shape[1])
        return Flow(
            rows={"image": image, "text": text, "temb": time, "bias": bias},
            shared={"grid": grid, "rotations": rotations},
        )

    def block(self, index: int, flow: Flow, attend: Attend) -> Flow:
        """One double-stream block: joint attention, then a feed-forward for either stream."""
        block, image, text = self._model.transformer_blocks[index], flow["image"], flow["text"]
        image_mod, image_mlp_mod = block.img_mod(flow["temb"])[:, None].chunk(2, dim=-1)
        text_mod, text_mlp_mod = block.txt_mod(flow["temb"])[:, None].chunk(2, dim=-1)
        modulated, gate = _modulate(block.img_norm1(image), image_mod)
        modulated_text, text_gate = _modulate(block.txt_norm1(text), text_mod)
        tokens = image.shape[1]
        heads = _heads(block.attn, modulated, modulated_text, flow["rotations"], flow["bias"])
        attended = attend(heads).transpose(1, 2).flatten(2, 3)
        image = image + gate * block.attn.to_out[0](attended[:, :tokens])
        text = text + text_gate * block.attn.to_add_out(attended[:, tokens:])
        modulated, gate = _modulate(block.img_norm2(image), image_mlp_mod)
        modulated_text, text_gate = _modulate(block.txt_norm2(text), text_mlp_mod)
        return flow.with_rows(
            image=_clipped(image + gate * block.img_mlp(modulated)),
            text=_clipped(text + text_gate * block.txt_mlp(modulated_text)),
        )

    def head(self, flow: Flow) -> Float[Tensor, "rows channels height width"]:
        """The velocity."""
        model = self._model
        return unpack(model.proj_out(model.norm_out(flow["image"], flow["temb"])), flow["grid"])

    def _rotations(self, inputs: Mapping[str, Tensor], grid: tuple[int, int], text: int) -> Tables:
        """Of image tokens, then of text: [tokens, head_dim / 2] each.

        The frame is 0. Rows and columns are centred: of five, -3 to 1. Text goes on where the longer half
        ends, on all three axes. The origin is part of every range and nothing is added to one:
        onnxruntime keeps sizes on the CPU and ranges on the GPU.
        """
        device, origin = inputs["hidden_states"].device, self._origin
        starts = [origin, *(origin - (size - size // 2) for size in grid)]
        behind = origin + torch.sym_max(grid[0] // 2, grid[1] // 2)
        positions = [
            torch.arange(start, start + size, device=device)
            for start, size in zip([*starts, behind], [1, *grid, text], strict=True)
        ]
        cosine, sine = (self._of_tokens(inputs[name], positions) for name in ("cosine", "sine"))
        return cosine, sine

    def _of_tokens(self, table: Tensor, positions: list[Tensor]) -> Float[Tensor, "tokens half"]:
        frame, rows, columns, text = (table.index_select(0, position) for position in positions)
        axes = zip((frame, rows, columns), range(3), strict=True)
        frame, rows, columns = (part.split(self._axes, dim=1)[axis] for part, axis in axes)
        image = grid_rows(rows, columns)
        return torch.cat([torch.cat([frame.expand(image.shape[0], -1), image], dim=1), text])


def blocks(model: QwenImageTransformer2DModel) -> QwenImageBlocks:
    """The blocks of a diffusers model; see :class:`~emag_export.families.protocol.Blocks`."""
    return QwenImageBlocks(model)


def _rotations(model: QwenImageTransformer2DModel) -> tuple[int, Tensor, Tensor]:
    """Where position 0 is, and the model's own tables as real float32 numbers, positions ascending."""
    embed = model.pos_embed
    below, table = embed.neg_freqs, torch.cat([embed.neg_freqs, embed.pos_freqs]).to(model.device)
    return below.shape[0], table.real.contiguous(), table.imag.contiguous()


def _frequencies(model: QwenImageTransformer2DModel) -> Float[Tensor, " half"]:
    """Of the sinusoids of time, float32, computed by torch on the CPU.

    In the graph their exponential would be folded by the exporter with numpy, which rounds otherwise.
    """
    projection = model.time_text_embed.time_proj
    half = projection.num_channels // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32)
    frequencies: Tensor = (exponent / (half - projection.downscale_freq_shift)).exp()
    return frequencies.to(model.device)


def _embed_time(
    model: Any,
    frequencies: Float[Tensor, " half"],
    timestep: Float[Tensor, " rows"],
    dtype: torch.dtype,
) -> Float[Tensor, "rows width"]:
    """As the pipeline and the model embed it: a thousandth of it in the model's dtype, angles in float32."""
    embed = model.time_text_embed
    share = (timestep.to(dtype) / 1000).float()
    angles = embed.time_proj.scale * (share[:, None] * frequencies)
    time: Tensor = embed.timestep_embedder(torch.cat([angles.cos(), angles.sin()], dim=1).to(dtype))
    return time


def _modulate(
    normed: Float[Tensor, "rows tokens width"], modulation: Float[Tensor, "rows 1 three_widths"]
) -> tuple[Tensor, Tensor]:
    """The modulated tokens, and the gate of what becomes of them."""
    shift, scale, gate = modulation.chunk(3, dim=-1)
    return normed * (1 + scale) + shift, gate


def _heads(attn: Any, image: Tensor, text: Tensor, rotations: Tables, bias: Tensor) -> Heads:
    heads = attn.heads
    query = joint(
        split_heads(attn.to_q(image), heads, attn.norm_q),
        split_heads(attn.add_q_proj(text), heads, attn.norm_added_q),
    )
    key = joint(
        split_heads(attn.to_k(image), heads, attn.norm_k),
        split_heads(attn.add_k_proj(text), heads, attn.norm_added_k),
    )
    return Heads(
        query=rotate(query, *rotations),
        key=rotate(key, *rotations),
        value=joint(split_heads(attn.to_v(image), heads), split_heads(attn.add_v_proj(text), heads)),
        image_tokens=image.shape[1],
        bias=bias,
    )


def _clipped(stream: Tensor) -> Tensor:
    return stream.clip(-_FLOAT16_MAX, _FLOAT16_MAX) if stream.dtype is torch.float16 else stream
