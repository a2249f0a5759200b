"""Finished latents to pictures, on the graph of a VAE decoder."""

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from emag_export.engines.protocol import TORCH_DTYPES, Engine
from emag_export.families.family import Latents

__all__ = ["Pictures", "decode_latents"]

Pictures = UInt8[np.ndarray, "images height width 3"]


def decode_latents(
    decoder: Engine,
    facts: Latents,
    latents: Float[Tensor, "images channels latent_height latent_width"],
) -> Pictures:
    """Latents to 8-bit sRGB pictures, one at a time so that memory does not grow with the batch.

    Args:
        decoder: Runs the graph ``vae_decoder``.
        facts: Scale and shift of the bundle's autoencoder.
        latents: On any device.

    Returns:
        On the host, where they arrive in one copy.
    """
    scale, shift = (
        torch.tensor(values, device=decoder.device)[:, None, None] for values in (facts.scale, facts.shift)
    )
    (dtype,) = (TORCH_DTYPES[tensor.dtype] for tensor in decoder.spec.inputs)
    samples = [
        decoder.run({"latent_sample": (image[None] / scale + shift).to(dtype)})["sample"]
        for image in latents.to(decoder.device)
    ]
    pictures = (torch.cat(samples).float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    return np.asarray((pictures * 255).round().to(torch.uint8).cpu().numpy())
