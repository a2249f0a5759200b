"""The autoencoder of Qwen-Image for one picture: that of a video whose only frame it is."""

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d, QwenImageUpsample
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import conv2d

__all__ = ["Decoder", "encode"]


class Decoder(nn.Module):
    """Decoder of the autoencoder for one frame; inputs and outputs are cast where it is kept in float32.

    Args:
        model: The diffusers autoencoder. It is changed: see :func:`_for_one_frame`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        whole: Any = _for_one_frame(model)
        self.first: Any = whole.post_quant_conv
        self.decoder: Any = whole.decoder
        self._dtype = whole.dtype

    def forward(self, latent_sample: Tensor) -> Tensor:
        """Pictures in -1 … 1 of latents in the autoencoder's own units."""
        frames = latent_sample.to(self._dtype)[:, :, None]
        sample: Tensor = self.decoder(self.first(frames))[:, :, 0].clamp(-1, 1)
        return sample.to(latent_sample.dtype)


class _FirstFrame(nn.Module):
    """A causal convolution for the first frame: in front of it are zeros, so one slice of the kernel counts.

    It takes a third of the products of the whole, and two dimensions are what engines are fastest at.
    """

    def __init__(self, conv: QwenImageCausalConv3d) -> None:
        super().__init__()
        # A view, as the weights of a large model are not read yet: see emag_export.exporter.source.place.
        self.weight = nn.Parameter(conv.weight[:, :, -1].detach(), requires_grad=False)
        self.bias = conv.bias
        self._stride = conv.stride[1:]
        left, _, above, *_ = conv._padding
        self._padding = (above, left)

    def forward(self, frames: Tensor, cache_x: None = None) -> Tensor:
        frame = conv2d(frames[:, :, 0], self.weight, self.bias, stride=self._stride, padding=self._padding)
        return frame[:, :, None]


def _for_one_frame(model: nn.Module) -> nn.Module:
    """Let a model compute the same of one frame by simpler operators.

    Twice as large, ``nearest`` takes the same pixels as ``nearest-exact``, which is no operator of ONNX.
    """
    for module in list(model.modules()):
        if isinstance(module, QwenImageUpsample):
            module.mode = "nearest"
        for name, child in list(module.named_children()):
            if isinstance(child, QwenImageCausalConv3d):
                setattr(module, name, _FirstFrame(child))
    return model


def encode(
    model: Any, pictures: Float[Tensor, "images 3 height width"]
) -> Float[Tensor, "images channels latent_height latent_width"]:
    """Latents of pictures in 0 … 1, in the autoencoder's own units; one at a time, to save memory."""
    frames = (2 * picture[None, :, None] - 1 for picture in pictures)
    return torch.cat([model.encode(frame).latent_dist.mode()[:, :, 0] for frame in frames])
