"""How many operations a run takes, and how many the GPU could do.

Counted, not written down: the model's own forward pass on PyTorch's ``meta`` device, which computes nothing.
"""

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from torch.utils.flop_counter import FlopCounterMode

from emag_export.bench.contender import Contender

__all__ = ["data_sheet_tflops", "row_flops", "run_flops"]

_DATA_SHEET = {"H200": 989.4, "H100 80GB HBM3": 989.4, "H100 PCIe": 756.5, "A100": 312.0, "L40S": 362.0}
"""Part of a device's name to TFLOP/s of its matrix units for half precision: dense, accumulating in float32.
From NVIDIA's data sheets, which give twice as many for sparse matrices."""


def row_flops(config: Mapping[str, Any], *, height: int, width: int, text: int) -> int:
    """Operations of one row in one pass of the whole model: two for each product that is added up.

    Args:
        config: Of the transformer, as in its ``config.json``.
        height: Of the latents.
        width: Of the latents.
        text: Tokens of the text.
    """
    return _counted(json.dumps(dict(config), sort_keys=True), height, width, text)


@lru_cache
def _counted(config: str, height: int, width: int, text: int) -> int:
    sizes = {name: value for name, value in json.loads(config).items() if not name.startswith("_")}
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = SD3Transformer2DModel(**sizes).eval()
        model(
            hidden_states=torch.empty(1, sizes["in_channels"], height, width),
            timestep=torch.empty(1),
            encoder_hidden_states=torch.empty(1, text, sizes["joint_attention_dim"]),
            pooled_projections=torch.empty(1, sizes["pooled_projection_dim"]),
        )
    return int(counter.get_total_flops())


def run_flops(contender: Contender, row: int) -> float:
    """Operations of a run for one image; what averaging and guidance add is left out.

    Args:
        contender: Says how many blocks run for how many rows.
        row: Of :func:`row_flops`.
    """
    return row * contender.row_blocks() / contender.plan.contract.num_blocks


def data_sheet_tflops(device: str, precision: str) -> float | None:
    """What the matrix units can do by the data sheet; None where that is not known here.

    Args:
        device: Its name as PyTorch gives it.
        precision: Of the graph; only half precision is known.
    """
    if precision not in ("float16", "bfloat16"):
        return None
    return next((tflops for name, tflops in _DATA_SHEET.items() if name in device), None)
