"""How many operations a run takes, and how many the GPU could do.

Counted, not written down: the model's own forward pass on PyTorch's ``meta`` device, which computes nothing.
"""

import diffusers
import torch
from torch.utils.flop_counter import FlopCounterMode

from emag_export.bench.contender import Contender
from emag_export.engines.protocol import TORCH_DTYPES
from emag_export.families.family import Config, Family
from emag_export.shapes import Sizes, evaluate

__all__ = ["data_sheet_tflops", "row_flops", "run_flops"]

_DATA_SHEET = {"H200": 989.4, "H100 80GB HBM3": 989.4, "H100 PCIe": 756.5, "A100": 312.0, "L40S": 362.0}
"""Part of a device's name to TFLOP/s of its matrix units for half precision: dense, accumulating in float32.
From NVIDIA's data sheets, which give twice as many for sparse matrices."""


def row_flops(family: Family, config: Config, sizes: Sizes) -> int:
    """Operations of one row in one pass of the whole model: two for each product that is added up.

    Args:
        family: Of the model.
        config: Of the transformer, as in its ``config.json``.
        sizes: Named dimensions of the picture and the text: ``{"h": 64, "w": 64, "text": 333}``.
    """
    one, shape = {**sizes, "trunk_rows": 1}, family.shape(config, "float32")
    arguments = {name: value for name, value in config.items() if not name.startswith("_")}
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = getattr(diffusers, family.transformer)(**arguments).eval()
        conditioning = {
            tensor.name: torch.empty(evaluate(tensor.dims, one), dtype=TORCH_DTYPES[tensor.dtype])
            for tensor in shape.conditioning
        }
        latents = torch.empty(1, *evaluate(shape.latents, one))
        family.part("oracle").predict(model, latents, torch.empty(1), conditioning)
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
