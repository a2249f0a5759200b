"""One candidate block in a perturbed pass, written as the algorithm reads: one function a kind.

An independent second implementation: it shares nothing with the exported graph, branches on data
where the graph must not, and writes into slices where the graph gathers and scatters.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import conv1d, pad, scaled_dot_product_attention

from emag_export.kinds import Renorm, Variant

__all__ = ["ATTEND", "Layout", "Probe", "left_out"]

_ROW_SUM_FLOOR = 1e-12
"""A softmax row whose kept part sums to nothing stays at zero instead of becoming 0/0."""

Heads = Float[Tensor, "rows heads tokens head_dim"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What is where in an attention."""

    image: slice
    """Image tokens in the sequence."""
    grid: tuple[int, ...] = ()
    """How many there are along each side."""
    columns: int = 0
    """Numbers along the last axis of E. Where the model is called with fewer keys, the others are padding
    that no query sees: there X is 0."""


class Probe:
    """State of one candidate block in one pass: measure Delta, update E, then say who is replaced.

    Its block calls it once, after which :attr:`average` and :attr:`delta` hold the results of kinds that
    average; a new one is made for every pass. The conditional rows are the last ``images`` ones, one per
    image.

    Args:
        renorm: How a partly replaced softmax row is brought back to sum one.
        average: E before this pass, None at the first accumulation.
        step: a in E + a (X - E).
        strength: lambda per image; 0 leaves an image alone.
        layout: What is where.
        blur_sigma: Standard deviation of a blur, in image tokens.
    """

    def __init__(
        self,
        *,
        renorm: Renorm,
        average: Float[Tensor, "images ..."] | None,
        step: float,
        strength: Float[Tensor, " images"],
        layout: Layout,
        blur_sigma: float = math.inf,
    ) -> None:
        self.renorm = renorm
        self.average = average
        self.step = step
        self.strength = strength.tolist()
        self.delta = torch.zeros_like(strength)
        self.image, self.grid, self.columns = layout.image, layout.grid, layout.columns
        self.blur_sigma = blur_sigma
        self.calls = 0

    @property
    def cond(self) -> slice:
        """The conditional rows."""
        return slice(-len(self.strength), None)

    def perturbed(self) -> list[tuple[int, float]]:
        """Conditional rows to perturb, counted from the end, and their lambda."""
        images = len(self.strength)
        return [(image - images, strength) for image, strength in enumerate(self.strength) if strength > 0]

    def accumulate(self, live: Float[Tensor, "images heads ..."]) -> Float[Tensor, "images heads ..."]:
        """Delta = mean |E_old - X|, then E <- E + a (X - E); the first X is E and has no Delta."""
        self.calls += 1
        keys = live.shape[-1]
        live = pad(live, (0, max(0, self.columns - keys)))
        if self.average is None:
            self.average = live
        else:
            old = self.average.reshape(live.shape)
            self.delta = (old - live).abs().flatten(1).mean(dim=1)
            self.average = old + self.step * (live - old)
        return self.average[..., :keys]


def _queries(probe: Probe, query: Heads, key: Heads, value: Heads, mask: Tensor | None) -> Heads:
    """The image queries of the conditional rows are X."""
    query = query.clone()
    live = query[probe.cond, :, probe.image].float()
    average = probe.accumulate(live)
    for row, strength in probe.perturbed():
        mixed = (1 - strength) * live[row] + strength * average[row]
        query[row, :, probe.image] = mixed.to(query.dtype)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask)


def _rows(probe: Probe, query: Heads, key: Heads, value: Heads, mask: Tensor | None) -> Heads:
    """Softmax rows of the image queries over all keys are X."""
    maps, values, attended = _maps(probe, query, key, value, mask)
    live = maps.clone()
    average = probe.accumulate(live)
    for row, strength in probe.perturbed():
        maps[row] = (1 - strength) * live[row] + strength * average[row]
    attended[probe.cond, :, probe.image] = maps.to(value.dtype) @ values
    return attended


def _image_block(probe: Probe, query: Heads, key: Heads, value: Heads, mask: Tensor | None) -> Heads:
    """The part of the rows that falls on image tokens is X."""
    return _block(probe, query, key, value, mask, text=False)


def _text_block(probe: Probe, query: Heads, key: Heads, value: Heads, mask: Tensor | None) -> Heads:
    """The part of the rows that falls on text tokens is X."""
    return _block(probe, query, key, value, mask, text=True)


def _block(probe: Probe, query: Heads, key: Heads, value: Heads, mask: Tensor | None, *, text: bool) -> Heads:
    maps, values, attended = _maps(probe, query, key, value, mask)
    tokens = maps.shape[-2]
    columns = slice(tokens, None) if text else slice(0, tokens)
    live = maps[..., columns].clone()
    average = probe.accumulate(live)
    for row, strength in probe.perturbed():
        maps[row, ..., columns] = (1 - strength) * live[row] + strength * average[row]
        maps[row] = _renormalised(maps[row], tokens, probe.renorm)
    attended[probe.cond, :, probe.image] = maps.to(value.dtype) @ values
    return attended


def _identity(probe: Probe, query: Heads, key: Heads, value: Heads, mask: Tensor | None) -> Heads:
    """An image token's output is its own value."""
    probe.calls += 1
    attended = scaled_dot_product_attention(query, key, value, attn_mask=mask).clone()
    for row, strength in probe.perturbed():
        own = value[row, :, probe.image]
        attended[row, :, probe.image] = (1 - strength) * attended[row, :, probe.image] + strength * own
    return attended


def _blurred(probe: Probe, query: Heads, key: Heads, value: Heads, mask: Tensor | None) -> Heads:
    """Image queries are blurred over their grid."""
    probe.calls += 1
    query = query.clone()
    for row, strength in probe.perturbed():
        live = query[row, :, probe.image].clone()
        query[row, :, probe.image] = (1 - strength) * live + strength * _blur(probe, live)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask)


def _blur(
    probe: Probe, live: Float[Tensor, "heads tokens head_dim"]
) -> Float[Tensor, "heads tokens head_dim"]:
    """Gaussian along one side after the other, by torch's own padding and convolution."""
    if probe.blur_sigma == 0:
        return live
    grid: Tensor = live.unflatten(1, probe.grid)
    sides = range(1, 1 + len(probe.grid))
    if math.isinf(probe.blur_sigma):
        return grid.mean(dim=tuple(sides), keepdim=True).expand_as(grid).reshape(live.shape)
    taps = math.ceil(6 * probe.blur_sigma) | 1
    offsets = torch.arange(taps, device=live.device) - taps // 2
    kernel = torch.exp(-(offsets**2) / (2 * probe.blur_sigma**2))
    kernel = (kernel / kernel.sum()).to(live.dtype)
    for side in sides:
        lines = grid.movedim(side, -1)
        padded = lines.reshape(-1, 1, lines.shape[-1])
        left = taps // 2 if lines.shape[-1] > 1 else 0
        while left > 0:  # torch reflects at most a line less its edge at a time
            part = min(left, padded.shape[-1] - 1)
            padded, left = pad(padded, (part, part), mode="reflect"), left - part
        blurred = conv1d(padded, kernel[None, None]) if lines.shape[-1] > 1 else padded
        grid = blurred.reshape(lines.shape).movedim(-1, side)
    return grid.reshape(live.shape)


def left_out(probe: Probe, before: Tensor, after: Tensor) -> Tensor:
    """A stream behind a block that is left out in some rows."""
    after = after.clone()
    for row, strength in probe.perturbed():
        after[row] = (1 - strength) * after[row] + strength * before[row]
    return after


def _maps(
    probe: Probe, query: Heads, key: Heads, value: Heads, mask: Tensor | None
) -> tuple[Float[Tensor, "images heads queries keys"], Float[Tensor, "images heads keys head_dim"], Heads]:
    """Maps of the conditional rows' image queries, their values, and ordinary attention of all rows.

    Keys and values of image tokens come first, as in the contract, wherever the model has them.
    """
    attended = scaled_dot_product_attention(query, key, value, attn_mask=mask).clone()
    scores = query[probe.cond, :, probe.image].float() @ key[probe.cond].float().transpose(2, 3)
    scores = scores / query.shape[-1] ** 0.5
    if mask is not None:
        scores = _masked(scores, mask[probe.cond], probe.image)
    places = torch.arange(key.shape[2], device=key.device)
    image = places[probe.image]
    order = torch.cat([image, places[~torch.isin(places, image)]])
    return torch.softmax(scores, dim=-1)[..., order], value[probe.cond][:, :, order], attended


def _masked(scores: Float[Tensor, "images heads queries keys"], mask: Tensor, image: slice) -> Tensor:
    """Scores of image queries behind a mask, which is True, or 0, where a query sees a key."""
    if mask.shape[-2] > 1:
        mask = mask[..., image, :]
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, -math.inf)
    return scores + mask.float()


def _renormalised(
    maps: Float[Tensor, "heads tokens keys"], tokens: int, renorm: Renorm
) -> Float[Tensor, "heads tokens keys"]:
    """Softmax rows of one image, image tokens first, after a part of them was replaced."""
    if renorm == Renorm.NONE:
        return maps
    if renorm == Renorm.ROW:
        return maps / maps.sum(dim=-1, keepdim=True).clamp(min=_ROW_SUM_FLOOR)
    scaled = maps.clone()
    left_for_text = (1 - maps[..., :tokens].sum(dim=-1, keepdim=True)).clamp(min=0)
    text_sum = maps[..., tokens:].sum(dim=-1, keepdim=True).clamp(min=_ROW_SUM_FLOOR)
    scaled[..., tokens:] *= left_for_text / text_sum
    return scaled


Attention = Callable[[Probe, Tensor, Tensor, Tensor, Tensor | None], Tensor]

ATTEND: Mapping[Variant, Attention] = MappingProxyType(
    {
        Variant.EMAG_Q: _queries,
        Variant.EMAG: _rows,
        Variant.EMAG_I: _image_block,
        Variant.EMAG_T: _text_block,
        Variant.IDENTITY: _identity,
        Variant.BLUR_QUERY: _blurred,
    }
)
"""(probe, query, key, value, mask) to the attention of every row, by kinds that change it; the one that does
not is :func:`left_out`."""
