"""Latents that a model takes as tokens of 2 x 2 patches, as facts; :mod:`.packing` packs them."""

from emag_export.shapes import Dim

__all__ = ["PATCH", "packed_latents"]

PATCH = 2
"""Latents along a side of a token."""


def packed_latents(channels: int) -> tuple[Dim, ...]:
    """Dimensions of the latents behind the rows.

    Args:
        channels: Of a token, as configurations count them.
    """
    return channels // PATCH**2, f"{PATCH}*h", f"{PATCH}*w"
