"""The named colours of the tiny-sd3 world, their words, and nearest-colour lookup; numpy only."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

RGB: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 220, 50),
    "orange": (240, 140, 30),
    "purple": (140, 50, 170),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
"""Colour name to sRGB, 0 to 255. Any two are at least 75 apart in Euclidean distance."""

COLOURS: tuple[str, ...] = tuple(RGB)


def palette() -> Float[np.ndarray, "colours 3"]:
    """Stack the palette in the order of :data:`COLOURS`.

    Returns:
        sRGB, 0 to 1.
    """
    return np.asarray(list(RGB.values()), dtype=np.float32) / 255.0


def nearest_colour(image: Float[np.ndarray, "height width 3"]) -> Int[np.ndarray, "height width"]:
    """Give every pixel the index of the palette colour nearest to it in Euclidean sRGB distance.

    Args:
        image: sRGB, 0 to 1.

    Returns:
        Indices into :data:`COLOURS`.
    """
    distance = ((image[:, :, None, :] - palette()[None, None]) ** 2).sum(-1)
    return np.asarray(distance.argmin(-1))
