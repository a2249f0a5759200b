"""Finished latents to pictures, on the graph of a VAE decoder."""

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from emag_export.engines.protocol import TORCH_DTYPES, Engine
from emag_export.errors import EngineError
from emag_export.families.family import Latents

__all__ = ["Pictures", "decode_latents"]

Pictures = UInt8[np.ndarray, "images height width 3"]


def decode_latents(
    decoder: Engine,
    facts: Latents,
    latents: Float[Tensor, "images channels latent_height latent_width"],
    *,
    refuse_broken: bool = True,
) -> Pictures:
    """Latents to 8-bit sRGB pictures, one at a time so that memory does not grow with the batch.

    Args:
        decoder: Runs the graph ``vae_decoder``.
        facts: Scale and shift of the bundle's autoencoder.
        latents: On any device.
        refuse_broken: Raise where a picture has NaN or infinity in it; otherwise such pixels have any colour.

    Returns:
        On the host, where they arrive in one copy.

    Raises:
        EngineError: If a picture is broken, saying whether its latents are.
    """
    scale, shift = (
        torch.tensor(values, device=decoder.device)[:, None, None] for values in (facts.scale, facts.shift)
    )
    (dtype,) = (TORCH_DTYPES[tensor.dtype] for tensor in decoder.spec.inputs)
    samples = [
        decoder.run({"latent_sample": (image[None] / scale + shift).to(dtype)})["sample"]
        for image in latents.to(decoder.device)
    ]
    decoded = torch.cat(samples).float()
    if refuse_broken and not bool(decoded.isfinite().all()):
        raise _broken(decoded, latents)
    pictures = (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    return np.asarray((pictures * 255).round().to(torch.uint8).cpu().numpy())


def _broken(decoded: Tensor, latents: Tensor) -> EngineError:
    """Which pictures have NaN or infinity in them, and whether the denoiser or the decoder made that."""
    finite = decoded.flatten(1).isfinite().all(dim=1)
    numbers = ", ".join(str(number + 1) for number in (~finite).nonzero().flatten().tolist())
    whose = "decoder" if bool(latents.isfinite().all()) else "denoiser"
    return EngineError(
        f"NaN or infinity from the {whose} in picture {numbers} of {len(decoded)}, which would be black or "
        "wrong. Float16 holds nothing above 65504: build with `precision` bf16 or fp32, or take a smaller "
        "`guidance_scale` or `emag_scale`; a comparison of the bundle with PyTorch tells in which step it "
        "begins"
    )
