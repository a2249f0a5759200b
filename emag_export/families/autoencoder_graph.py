"""diffusers' ``AutoencoderKL`` as a module with named inputs and outputs."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from emag_export.families.half import keep_norms_in_float32

__all__ = ["KlDecoder", "encode"]


class KlDecoder(nn.Module):
    """Decoder of the autoencoder; its inputs and outputs are cast where it is kept in float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = keep_norms_in_float32(model)

    def forward(self, latent_sample: Tensor) -> Tensor:
        """Pictures in -1 … 1 of latents in the autoencoder's own units."""
        latents = latent_sample.to(self.model.dtype)
        sample: Tensor = self.model.decode(latents, return_dict=False)[0]
        return sample.to(latent_sample.dtype)


def encode(
    model: Any, pictures: Float[Tensor, "images 3 height width"]
) -> Float[Tensor, "images channels latent_height latent_width"]:
    """Latents of pictures in 0 … 1, in the autoencoder's own units; one at a time, to save memory."""
    return torch.cat([model.encode(2 * picture[None] - 1).latent_dist.mode() for picture in pictures])
