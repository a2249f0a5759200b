"""diffusers' ``Timesteps``, sinusoids of a number, with frequencies that torch computes before the tracing.

Left in a graph, their exponential is folded by the exporter with numpy, 1.8e-7 away from torch's: at timestep
1000 that is 6e-5 rad, which made onnxruntime's prediction of a small model 3.4e-5 wrong, four times what is
left now.
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["frequencies_of", "waves_of"]


def frequencies_of(projection: Any) -> Float[Tensor, " half"]:
    """Radians per unit of every sinusoid, float32, computed on the CPU.

    Args:
        projection: A ``Timesteps`` of diffusers.
    """
    half = projection.num_channels // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32)
    frequencies: Tensor = projection.scale * (exponent / (half - projection.downscale_freq_shift)).exp()
    return frequencies


def waves_of(
    projection: Any, values: Float[Tensor, " rows"], frequencies: Float[Tensor, " half"]
) -> Float[Tensor, "rows width"]:
    """Cosines and sines as ``projection`` orders them; angles are float32.

    Args:
        projection: A ``Timesteps`` of diffusers.
        values: Timesteps, or what else is embedded like them.
        frequencies: Of :func:`frequencies_of`.
    """
    angles = values[:, None].float() * frequencies
    waves = [angles.cos(), angles.sin()]
    return torch.cat(waves if projection.flip_sin_to_cos else waves[::-1], dim=1)
