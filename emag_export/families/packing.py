"""Latents as tokens of 2 x 2 patches and back, as several families pack them; traced into their graphs."""

from jaxtyping import Float
from torch import Tensor

from emag_export.families.packed import PATCH

__all__ = ["grid_of", "pack", "unpack"]


def grid_of(latents: Float[Tensor, "rows channels height width"]) -> tuple[int, int]:
    """Tokens along height and width; symbols while a graph is traced."""
    return latents.shape[2] // PATCH, latents.shape[3] // PATCH


def pack(latents: Float[Tensor, "rows channels height width"]) -> Float[Tensor, "rows tokens packed"]:
    """Tokens row by row; in each the channels, and of every channel its patch, row by row.

    Source:
        ``FluxPipeline._pack_latents`` of diffusers, whose result this equals.
    """
    patches: Tensor = latents.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))  # rows channels h 2 w 2
    tokens: Tensor = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    return tokens


def unpack(
    tokens: Float[Tensor, "rows tokens packed"], grid: tuple[int, int]
) -> Float[Tensor, "rows channels height width"]:
    """The inverse of :func:`pack`.

    Args:
        tokens: Of the whole picture.
        grid: How many there are along height and width.
    """
    cells: Tensor = tokens.unflatten(2, (-1, PATCH, PATCH)).unflatten(1, grid)  # rows h w channels 2 2
    latents: Tensor = cells.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    return latents
