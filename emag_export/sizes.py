"""Sizes of a call: from pixels and pictures to the named dimensions of a contract.

A model says how its latents and image tokens are named (``"2*h"``, ``"h"``); how many pixels a latent has,
and how long a text is, comes from its other components and is a bundle's :class:`Geometry`.
"""

import itertools
from dataclasses import dataclass
from math import gcd, prod

from emag_export.contract import DenoiserContract
from emag_export.errors import BundleError, ContractError, InputError
from emag_export.kinds import Variant
from emag_export.shapes import Sizes, evaluate, solve, symbols

__all__ = [
    "Geometry",
    "TextRange",
    "call_sizes",
    "picture_sizes",
    "run_sizes",
    "side_pixels",
    "whole_sizes",
]

_SIDES = ("height", "width")


@dataclass(frozen=True, kw_only=True)
class TextRange:
    """How many tokens the dimension ``text`` has; all 0 for a model without one."""

    least: int
    usual: int
    most: int

    def __post_init__(self) -> None:
        if not 0 <= self.least <= self.usual <= self.most:
            raise BundleError(f"text is {self}; the three numbers must ascend from 0 or more")


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Sizes that are no part of the denoiser's contract."""

    pixels_per_latent: int
    """Along a side."""
    text: TextRange

    def __post_init__(self) -> None:
        if self.pixels_per_latent < 1:
            raise BundleError(f"pixels_per_latent is {self.pixels_per_latent}; it must be at least 1")


def side_pixels(contract: DenoiserContract, geometry: Geometry) -> tuple[int, int]:
    """Pixels of an image token along height and width; of the whole picture where its size is fixed.

    Args:
        contract: Names the sides of the latents.
        geometry: Pixels per latent.
    """
    height, width = (evaluate([dim], dict.fromkeys(symbols([dim]), 1))[0] for dim in contract.latents[-2:])
    return height * geometry.pixels_per_latent, width * geometry.pixels_per_latent


def picture_sizes(
    contract: DenoiserContract,
    geometry: Geometry,
    *,
    height: int,
    width: int,
    names: tuple[str, str] = _SIDES,
) -> Sizes:
    """Named dimensions that follow from the size of a picture: ``{"h": 64, "w": 64}``.

    Args:
        contract: Names the sides of the latents, and how large they may be.
        geometry: Pixels per latent.
        height: Pixels.
        width: Pixels.
        names: Of the parameters that gave both, for errors.

    Raises:
        InputError: If the model takes no picture of this size, with sizes that it takes.
    """
    found: dict[str, int] = {}
    units = side_pixels(contract, geometry)
    for side, dim, pixels, unit in zip(names, contract.latents[-2:], (height, width), units, strict=True):
        if isinstance(dim, int):
            if pixels != unit:
                raise InputError(f"`{side}` {pixels} is not what this model was made for; take {unit}")
            continue
        if pixels < unit or pixels % unit:
            below, above = max(unit, pixels // unit * unit), max(unit, (pixels // unit + 1) * unit)
            raise InputError(f"`{side}` {pixels} is no multiple of {unit}; take {below} or {above}")
        (name,) = symbols([dim])
        found[name] = pixels // unit
        limit = contract.limits.get(name)
        if limit is not None and found[name] > limit:
            raise InputError(
                f"`{side}` {pixels} is more than this model's positional embedding covers: {limit * unit}"
            )
    _require_whole(contract, found, units, names)
    return found


def _require_whole(
    contract: DenoiserContract, found: Sizes, units: tuple[int, int], names: tuple[str, str]
) -> None:
    """Refuse pictures whose tokens the model fills up itself, where averages know no such tokens."""
    if whole_sizes(contract, found) == found:
        return
    (tokens,) = evaluate([contract.tokens], found)
    multiple = contract.whole[str(contract.tokens)]
    larger = (
        dict(zip(found, sizes, strict=True))
        for sizes in itertools.product(*(range(size, size + multiple) for size in found.values()))
    )
    nearest = min(
        (sizes for sizes in larger if whole_sizes(contract, sizes) == sizes),
        key=lambda sizes: sum(sizes.values()),
    )
    sides = zip(names, units, contract.latents[-2:], strict=True)
    takes = [f"`{name}` {unit * nearest[symbols([dim])[0]]}" for name, unit, dim in sides]
    raise InputError(
        f"this picture has {tokens} image tokens, and {contract.variant} of this model takes a multiple of "
        f"{multiple}; take {' and '.join(takes)}, or build another `variant`, for example {Variant.EMAG_Q}"
    )


def whole_sizes(contract: DenoiserContract, sizes: Sizes) -> Sizes:
    """The least sizes, none smaller than these, that averages of this kind can have.

    Args:
        contract: Of the denoiser.
        sizes: Of some or all named dimensions.
    """
    found = dict(sizes)
    for dim, multiple in contract.whole.items():
        name, *others = symbols([dim])
        if name in found and all(other in found for other in others):
            step = multiple // gcd(multiple, prod(found[other] for other in others))
            found[name] = -(-found[name] // step) * step
    return found


def call_sizes(
    contract: DenoiserContract, geometry: Geometry, *, images: int, height: int, width: int
) -> Sizes:
    """Every named dimension of a call in which rows ``[u, c]`` of every picture fork into ``[u, c, p]``.

    Args:
        contract: Of the denoiser.
        geometry: Pixels per latent, and the usual text length.
        images: Pictures in the call.
        height: Pixels.
        width: Pixels.

    Raises:
        InputError: If there is no picture, or the model takes none of this size.
    """
    if images < 1:
        raise InputError(f"a call for {images} pictures was asked for; give at least 1")
    sizes = {
        "trunk_rows": 2 * images,
        "rows": 3 * images,
        "tracked": images,
        "text": geometry.text.usual,
        **picture_sizes(contract, geometry, height=height, width=width),
    }
    return {name: sizes[name] for name in contract.graph.symbols}


def run_sizes(contract: DenoiserContract, shapes: dict[str, tuple[int, ...]]) -> Sizes:
    """Named dimensions of a run, from its tensors.

    Args:
        contract: Of the denoiser.
        shapes: ``latents`` and every conditioning tensor by name, images first.

    Raises:
        ContractError: If a tensor is missing or does not fit, or two disagree.
    """
    dims = {"latents": ("trunk_rows", *contract.latents)}
    dims |= {tensor.name: tensor.dims for tensor in contract.conditioning}
    if missing := [name for name in dims if name not in shapes]:
        raise ContractError(f"{', '.join(missing)} is missing; a run takes {', '.join(dims)}")
    return solve(dims, {name: shapes[name] for name in dims})
