"""The network: four convolutions and a linear layer to the features, and what it learns to tell from them."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

from emag_export.tiny_sd3.palette import COLOURS
from emag_export.tiny_sd3.scenes import SHAPES

__all__ = ["FEATURES", "WEIGHTS", "Extractor", "load_extractor"]

FEATURES = 64
"""Numbers per picture."""

WEIGHTS = Path(__file__).parent / "weights.safetensors"

_CHANNELS = (3, 24, 48, 96, 96)
DAMAGE = 3
"""How much a picture was warped, blurred, and covered with noise."""

Images = Float[Tensor, "rows 3 64 64"]


class Extractor(nn.Module):
    """Features of 64 x 64 pictures, and heads that are trained with them.

    The heads say of every colour whether an object has it, and of which shape, place and radius it is; the
    background's colour; and how the picture was damaged. So the features hold what is in a picture and how
    well it is drawn.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in pairwise(_CHANNELS):
            layers += [nn.Conv2d(before, after, 3, 2, 1), nn.GroupNorm(8, after), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(_CHANNELS[-1] * 16, FEATURES))
        colours = len(COLOURS)
        self.background = nn.Linear(FEATURES, colours)
        self.present = nn.Linear(FEATURES, colours)
        self.shape = nn.Linear(FEATURES, colours * len(SHAPES))
        self.place = nn.Linear(FEATURES, colours * 3)
        self.damage = nn.Linear(FEATURES, DAMAGE)

    def forward(self, images: Images) -> Float[Tensor, "rows features"]:
        """Features of pictures.

        Args:
            images: sRGB, -1 to 1.
        """
        features: Tensor = self.layers(images)
        return features


def load_extractor() -> Extractor:
    """The trained network, float32, on the CPU."""
    extractor = Extractor()
    stored = load_file(WEIGHTS)
    extractor.load_state_dict({name: value.to(torch.float32) for name, value in stored.items()})
    return extractor.eval().requires_grad_(False)
