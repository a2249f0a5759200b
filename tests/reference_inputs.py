"""The recorded model and random inputs: what the tests of the reference and of comparisons start from."""

from functools import cache
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from emag_export.runtime.sampling.conditioning import Conditioning
from tests.sd3 import conditioning

GOLDEN = Path(__file__).parent / "golden"


@cache
def golden_model(dtype: torch.dtype = torch.float32) -> SD3Transformer2DModel:
    """The model of the recorded runs; shared, so copy it to change it."""
    return SD3Transformer2DModel.from_pretrained(GOLDEN / "mmdit", torch_dtype=dtype).eval()


def random_inputs(
    model: SD3Transformer2DModel,
    *,
    images: int = 2,
    seed: int = 5,
    tokens: int = 5,
    size: tuple[int, int] = (12, 8),
) -> tuple[Tensor, Conditioning]:
    """Noise of ``size`` latents and prompts of ``tokens`` tokens, standard normal throughout."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(images, *shape, generator=generator)

    text, pooled = model.config.joint_attention_dim, model.config.pooled_projection_dim
    return normal(model.config.in_channels, *size), conditioning(
        normal(tokens, text), normal(pooled), normal(tokens, text), normal(pooled)
    )
