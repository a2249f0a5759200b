"""Quantisation in plain PyTorch, written for tests: what the graphs are held against."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from emag_export.exporter.quantise.apply import HEADROOM
from emag_export.quantisation import Scheme


def fp8(x: Tensor, scale: Tensor | float) -> Tensor:
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def int8(x: Tensor, scale: Tensor | float) -> Tensor:
    return (x / scale).round().clamp(-127, 127) * scale


class Fake(nn.Module):
    """A linear whose numbers are rounded and kept in float32.

    Args:
        original: With the weights.
        scheme: Of quantisation.
        largest: Range of its input, for FP8.
        bases: For every row behind the fork, the row that it continues: set before a call.
        differences: Whether rows that continue another one are rounded as their difference to it.
    """

    def __init__(
        self, original: nn.Linear, scheme: Scheme, largest: float, bases: list[int], differences: bool
    ) -> None:
        super().__init__()
        self.original, self.scheme, self.largest = original, scheme, largest
        self.bases, self.differences = bases, differences
        self.in_features, self.out_features = original.in_features, original.out_features

    @property
    def weight(self) -> Tensor:
        return self.original.weight

    def forward(self, x: Tensor) -> Tensor:
        weight, vector = self.original.weight, x.ndim == 2
        largest = weight.abs().amax(dim=1, keepdim=True)
        form = fp8 if self.scheme == Scheme.FP8 and not vector else int8
        weight = form(weight, largest / (448 if form is fp8 else 127))
        continues = [(row, base) for row, base in enumerate(self.bases) if row != base]
        splits = self.differences and not vector and x.shape[0] == len(self.bases)
        taken = x.clone()
        for row, base in continues if splits else ():
            taken[row] = x[row] - x[base]
        y = linear(self.rounded(taken, vector), weight)
        for row, base in continues if splits else ():
            y[row] += y[base]
        return y if self.original.bias is None else y + self.original.bias

    def rounded(self, x: Tensor, vector: bool) -> Tensor:
        if self.scheme == Scheme.W8 or (self.scheme == Scheme.FP8 and vector):
            return x
        if self.scheme == Scheme.FP8:
            return fp8(x, 2.0 ** round(math.log2(HEADROOM * self.largest / 448)))
        return int8(x, x.abs().amax(dim=-1, keepdim=True).clamp_min(1e-6) / 127)


def in_blocks(model: nn.Module) -> dict[str, nn.Linear]:
    """The linears of a model's blocks, as its own list of modules has them."""
    lists = {name for name, module in model.named_children() if isinstance(module, nn.ModuleList)}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.split(".")[0] in lists and ".emb." not in name
    }


def fake_quantised(
    model: Any, scheme: Scheme, ranges: Mapping[str, float], bases: list[int], *, differences: bool = True
) -> None:
    """Exchange the linears of a model's blocks for rounding ones, in place."""
    for name, module in in_blocks(model).items():
        owner, _, leaf = name.rpartition(".")
        fake = Fake(module, scheme, ranges.get(name, 0.0), bases, differences)
        setattr(model.get_submodule(owner), leaf, fake)


def ranges_of(model: nn.Module, call: Callable[[], object]) -> dict[str, float]:
    """Largest absolute input of every linear in one call."""
    found: dict[str, float] = {}

    def see(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            found[name] = max(found.get(name, 0.0), float(arguments[0].abs().max()))

        return hook

    handles = [m.register_forward_pre_hook(see(n)) for n, m in in_blocks(model).items()]
    call()
    for handle in handles:
        handle.remove()
    return found
