"""Inputs for tracing and for checking, derived from a graph's contract and a seed."""

from collections.abc import Mapping

import torch
from torch import Tensor

from emag_export.contract import BLUR_INPUTS, GUIDANCE_INPUT, GraphSpec, TensorSpec
from emag_export.engines.protocol import TORCH_DTYPES
from emag_export.families.masks import random_mask
from emag_export.shapes import Sizes, evaluate

__all__ = ["DENOISER_CHECK_SIZES", "DENOISER_EXAMPLE_SIZES", "random_inputs"]

DENOISER_EXAMPLE_SIZES: Sizes = {"trunk_rows": 4, "rows": 6, "tracked": 2, "text": 11, "h": 6, "w": 4}
"""Batch above one, height unlike width, and no two sizes that could be taken for one another by chance."""

DENOISER_CHECK_SIZES: tuple[Sizes, ...] = (
    {"trunk_rows": 1, "rows": 1, "tracked": 1, "text": 5, "h": 5, "w": 7},
    {"trunk_rows": 2, "rows": 3, "tracked": 1, "text": 18, "h": 3, "w": 8},
    {"trunk_rows": 6, "rows": 8, "tracked": 3, "text": 9, "h": 8, "w": 5},
)
"""None is the example: one row, odd grids, either orientation, other text lengths, mixed phases."""


def random_inputs(spec: GraphSpec, sizes: Sizes, *, seed: int = 0) -> dict[str, Tensor]:
    """Values of every input that exercise the whole graph.

    Args:
        spec: The graph.
        sizes: Of its named dimensions.
        seed: Same seed, same values.
    """
    generator = torch.Generator().manual_seed(seed)
    return {tensor.name: _values(tensor, sizes, generator) for tensor in spec.inputs}


def _values(tensor: TensorSpec, sizes: Sizes, generator: torch.Generator) -> Tensor:
    shape = evaluate(tensor.dims, sizes)
    if tensor.name == "branch_rows":
        return torch.arange(shape[0]) % sizes["trunk_rows"]
    if tensor.name == "input_ids":
        return torch.randint(0, 100, shape, generator=generator)
    if tensor.is_mask:
        return random_mask(shape, generator)
    if tensor.below is not None:
        return torch.randint(0, tensor.below, shape, generator=generator)
    scale = _UNIFORM.get(tensor.name)
    if scale is not None:
        return torch.rand(shape, generator=generator).to(TORCH_DTYPES[tensor.dtype]) * scale
    return torch.randn(shape, generator=generator).to(TORCH_DTYPES[tensor.dtype])


_UNIFORM: Mapping[str, float] = {
    "timestep": 1000.0,
    "ema_step": 1.0,
    "layer_mask": 1.0,
    "ema_state": 0.02,
    GUIDANCE_INPUT: 5.0,
    **dict.fromkeys(BLUR_INPUTS, 0.2),
}
"""Inputs that are no normal variables, and the top of their range."""
