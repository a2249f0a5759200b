"""Attention of one candidate block in a perturbed pass, written as the algorithm reads.

An independent second implementation: it shares nothing with the exported graph, branches on data
where the graph must not, and writes into slices where the graph gathers and scatters.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from emag_export.contract import Renorm, Variant
from emag_export.errors import ModelError

__all__ = ["PerturbingProcessor", "installed"]

_ROW_SUM_FLOOR = 1e-12
"""A softmax row whose kept part sums to nothing stays at zero instead of becoming 0/0."""

Heads = Float[Tensor, "rows heads tokens head_dim"]


class PerturbingProcessor:
    """Attention processor of one block in one pass: measure Delta, update E, then replace.

    Called by diffusers once, after which :attr:`average` and :attr:`delta` hold the results; a new
    one is made for every pass. The conditional rows are the last ``images`` ones, one per image.

    Args:
        variant: What is averaged.
        renorm: How a partly replaced softmax row is brought back to sum one.
        average: E before this pass, None at the first accumulation.
        step: a in E + a (X - E).
        strength: lambda per image; 0 leaves an image alone.
    """

    def __init__(
        self,
        *,
        variant: Variant,
        renorm: Renorm,
        average: Float[Tensor, "images ..."] | None,
        step: float,
        strength: Float[Tensor, " images"],
    ) -> None:
        self.variant = variant
        self.renorm = renorm
        self.average = average
        self.step = step
        self.strength = strength.tolist()
        self.delta = torch.zeros_like(strength)

    def __call__(
        self,
        attn: Attention,
        hidden_states: Float[Tensor, "rows image_tokens width"],
        encoder_hidden_states: Float[Tensor, "rows text_tokens width"],
        attention_mask: None = None,
    ) -> tuple[Tensor, Tensor]:
        """Joint attention as ``JointAttnProcessor2_0`` computes it, perturbed on the way."""
        image, text = hidden_states, encoder_hidden_states
        query = _joint(attn, image, text, ("to_q", "add_q_proj"), ("norm_q", "norm_added_q"))
        key = _joint(attn, image, text, ("to_k", "add_k_proj"), ("norm_k", "norm_added_k"))
        value = _joint(attn, image, text, ("to_v", "add_v_proj"), None)
        attend = self._query if self.variant == Variant.EMAG_Q else self._map
        attended = attend(query, key, value, image.shape[1]).transpose(1, 2).flatten(2)
        to_image, to_text = attended[:, : image.shape[1]], attended[:, image.shape[1] :]
        if not attn.context_pre_only:
            to_text = attn.to_add_out(to_text)
        return attn.to_out[1](attn.to_out[0](to_image)), to_text

    def _query(self, query: Heads, key: Heads, value: Heads, tokens: int) -> Heads:
        """``emag-q``: the image queries of the conditional rows are X."""
        live = query[-len(self.strength) :, :, :tokens].float().clone()
        average = self._accumulate(live)
        for row, strength in self._perturbed():
            query[row, :, :tokens] = ((1 - strength) * live[row] + strength * average[row]).to(query.dtype)
        return scaled_dot_product_attention(query, key, value)

    def _map(self, query: Heads, key: Heads, value: Heads, tokens: int) -> Heads:
        """``emag``, ``emag-i``, ``emag-t``: softmax rows of the image queries, or a part of them, are X."""
        attended = scaled_dot_product_attention(query, key, value)
        columns = {
            Variant.EMAG: slice(None),
            Variant.EMAG_I: slice(None, tokens),
            Variant.EMAG_T: slice(tokens, None),
        }[self.variant]
        cond = slice(-len(self.strength), None)
        scores = query[cond, :, :tokens].float() @ key[cond].float().transpose(2, 3)
        maps = torch.softmax(scores / query.shape[-1] ** 0.5, dim=-1)
        live = maps[..., columns].clone()
        average = self._accumulate(live)
        for row, strength in self._perturbed():
            maps[row, ..., columns] = (1 - strength) * live[row] + strength * average[row]
            if self.variant != Variant.EMAG:
                maps[row] = _renormalised(maps[row], tokens, self.renorm)
        attended[cond, :, :tokens] = maps.to(value.dtype) @ value[cond]
        return attended

    def _perturbed(self) -> list[tuple[int, float]]:
        """Conditional rows to perturb, counted from the end, and their lambda."""
        images = len(self.strength)
        return [(image - images, strength) for image, strength in enumerate(self.strength) if strength > 0]

    def _accumulate(self, live: Float[Tensor, "images heads ..."]) -> Float[Tensor, "images heads ..."]:
        """Delta = mean |E_old - X|, then E <- E + a (X - E); the first X is E and has no Delta."""
        if self.average is None:
            self.average = live
            return live
        old = self.average.reshape(live.shape)
        self.delta = (old - live).abs().flatten(1).mean(dim=1)
        self.average = old + self.step * (live - old)
        return self.average


def _joint(
    attn: Any, image: Tensor, text: Tensor, project: tuple[str, str], norm: tuple[str, str] | None
) -> Heads:
    """Project image and text tokens, split them into heads, normalise, and put image before text."""
    streams = []
    for index, tokens in enumerate((image, text)):
        heads = getattr(attn, project[index])(tokens)
        heads = heads.view(*heads.shape[:2], attn.heads, -1).transpose(1, 2)
        normalise = getattr(attn, norm[index]) if norm else None
        streams.append(heads if normalise is None else normalise(heads))
    return torch.cat(streams, dim=2)


def _renormalised(
    maps: Float[Tensor, "heads tokens keys"], tokens: int, renorm: Renorm
) -> Float[Tensor, "heads tokens keys"]:
    """Softmax rows of one image after a part of them was replaced."""
    if renorm == Renorm.NONE:
        return maps
    if renorm == Renorm.ROW:
        return maps / maps.sum(dim=-1, keepdim=True).clamp(min=_ROW_SUM_FLOOR)
    scaled = maps.clone()
    left_for_text = (1 - maps[..., :tokens].sum(dim=-1, keepdim=True)).clamp(min=0)
    text_sum = maps[..., tokens:].sum(dim=-1, keepdim=True).clamp(min=_ROW_SUM_FLOOR)
    scaled[..., tokens:] *= left_for_text / text_sum
    return scaled


@contextmanager
def installed(model: SD3Transformer2DModel, processors: Mapping[int, PerturbingProcessor]) -> Iterator[None]:
    """Exchange the attention processors of some blocks, and put the old ones back whatever happens.

    Args:
        model: The diffusers transformer.
        processors: Block number to its processor.

    Raises:
        ModelError: If a block does not have diffusers' standard SD3 processor, whose mathematics the
            perturbing one repeats.
    """
    attentions = {block: model.transformer_blocks[block].attn for block in processors}
    originals = {block: attn.processor for block, attn in attentions.items()}
    for block, original in originals.items():
        if type(original) is not JointAttnProcessor2_0:
            raise ModelError(
                f"block {block} has attention processor {type(original).__name__}, the reference repeats "
                "JointAttnProcessor2_0; unfuse projections and remove adapters, or call "
                "model.set_attn_processor(JointAttnProcessor2_0())"
            )
    try:
        for block, attn in attentions.items():
            attn.set_processor(processors[block])
        yield
    finally:
        for block, attn in attentions.items():
            attn.set_processor(originals[block])
