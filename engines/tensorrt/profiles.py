"""Optimisation profiles: for every named dimension the sizes an engine is built for, from the contract."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

from emag_export.bundle import DENOISER
from emag_export.contract import DenoiserContract, GraphSpec
from emag_export.engines.limits import MAX_ELEMENTS, largest, what_fits
from emag_export.engines.tensorrt.flavour import Flavour
from emag_export.engines.tensorrt.options import (
    DEFAULT_IMAGES,
    DEFAULT_IMAGES_OF_MAPS,
    EngineOptions,
    SizeRange,
)
from emag_export.errors import Call, ContractError, InputError
from emag_export.families import family_of
from emag_export.kinds import Averaged
from emag_export.models import SamplingDefaults
from emag_export.shapes import Sizes, evaluate, symbols
from emag_export.sizes import Geometry, picture_sizes, side_pixels

__all__ = ["Profile", "Shapes", "Sized", "choose_profile", "profile_shapes", "profiles_of"]

Profile = Mapping[str, SizeRange]
"""Range of every named dimension of one graph."""

Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Smallest, optimal and largest shape of one input."""

_Call = tuple[int, SizeRange, SizeRange]
"""Images, and pixels of height and width."""

_REMEDIES = {
    "rows": "max_images",
    "trunk_rows": "max_images",
    "tracked": "max_images",
    "h": "height_range",
    "w": "width_range",
    "text": "max_sequence_length",
    "tokens": "max_sequence_length",
}
"""Named dimension to the parameter that widens it."""

_RANGES = ("height_range", "width_range")

_TRUNK, _BRANCHES = 2, 3
"""Rows of one image: unconditional and conditional; in the perturb window one branch row more."""


@runtime_checkable
class Sized(Protocol):
    """What sizes follow from: a bundle, or the plan of one."""

    @property
    def contract(self) -> DenoiserContract:
        """Dimensions of the model."""

    @property
    def defaults(self) -> SamplingDefaults:
        """Its own picture size and text length."""

    @property
    def geometry(self) -> Geometry:
        """Pixels per latent, and how long a text is."""


def profiles_of(
    model: Sized, spec: GraphSpec, options: EngineOptions, flavour: Flavour
) -> tuple[Profile, ...]:
    """The profiles one component is built with.

    The denoiser is called with two rows an image outside the perturb window and with three inside.
    Where kernels are chosen for a profile's optimum, each of the two gets a profile. The optimum is a call
    for one image.

    Raises:
        InputError: If a resolution does not fit the model, or a tensor would have too many elements.
    """
    images, height, width = _largest(model, options)
    if spec.name != DENOISER:
        # Prompts are encoded, and pictures decoded, one by one: their neighbours shall not change them.
        ranges = {"rows": _up_to(1)}
        added = family_of(model.contract).component(spec.name).added_tokens
        ranges |= {"tokens": _up_to(model.defaults.max_sequence_length + added)}
        pixels = model.geometry.pixels_per_latent
        ranges |= {"h": height.divided(pixels, _RANGES[0]), "w": width.divided(pixels, _RANGES[1])}
        return ({name: ranges[name] for name in spec.symbols},)
    shared = _denoiser_ranges(model, images, height, width)
    rows = [_per_image(_BRANCHES, images)]
    if flavour.profile_per_row_count:
        rows.insert(0, _per_image(_TRUNK, images))
    return tuple({name: {**shared, "rows": r}[name] for name in spec.symbols} for r in rows)


def _denoiser_ranges(model: Sized, images: int, height: SizeRange, width: SizeRange) -> dict[str, SizeRange]:
    cells, text = side_pixels(model.contract, model.geometry), model.geometry.text
    ranges = {
        "trunk_rows": _per_image(_TRUNK, images),
        "rows": _per_image(_BRANCHES, images),
        "tracked": _per_image(1, images),
        "h": height.divided(cells[0], _RANGES[0]),
        "w": width.divided(cells[1], _RANGES[1]),
        "text": SizeRange(min=text.least, opt=text.usual, max=text.most),
    }
    return {name: ranges[name] for name in model.contract.graph.symbols}


def _up_to(most: int) -> SizeRange:
    return SizeRange(min=1, opt=most, max=most)


def _per_image(rows: int, images: int) -> SizeRange:
    return SizeRange(min=1, opt=rows, max=rows * images)


def _largest(model: Sized, options: EngineOptions) -> _Call:
    """The largest call: what was asked for, and defaults whose averages fit into one tensor."""
    spec, (cell, _) = model.contract.graph, side_pixels(model.contract, model.geometry)
    for call in _calls(model, options):
        sizes = {name: size.max for name, size in _denoiser_ranges(model, *call).items()}
        tensor, count = largest(spec, sizes)
        if count <= MAX_ELEMENTS:
            return call
    images, height, width = call
    raise InputError(
        f"{tensor.name} would have {count} elements with {images} picture{'s' * (images > 1)} of "
        f"{height.max} x {width.max} pixels, TensorRT takes at most {MAX_ELEMENTS} in a tensor: "
        f"{what_fits(spec, sizes, cell=cell, unit='pixels')}; lower `max_images`, `height_range` or "
        "`width_range`, or average fewer blocks (`emag_candidates`)"
    )


def _calls(model: Sized, options: EngineOptions) -> Iterator[_Call]:
    """What was asked for, and where nothing was, the default first and then less of it."""
    cell = max(side_pixels(model.contract, model.geometry))
    height, width = _resolution(model, options)
    most, least = options.max_images, options.max_images or 1
    if most is None:
        most = DEFAULT_IMAGES if model.contract.kind.averages == Averaged.QUERIES else DEFAULT_IMAGES_OF_MAPS
    for images in range(most, least - 1, -1):
        for less in range(0, max(height.max - height.opt, width.max - width.opt) + 1, cell):
            yield (
                images,
                height if options.height_range else _lowered(height, less),
                width if options.width_range else _lowered(width, less),
            )


def _lowered(size: SizeRange, less: int) -> SizeRange:
    return SizeRange(min=size.min, opt=size.opt, max=max(size.opt, size.max - less))


def _resolution(model: Sized, options: EngineOptions) -> tuple[SizeRange, SizeRange]:
    """Pixels of both sides: as asked for, else half to one and a half of the model's own size.

    Raises:
        InputError: If the model takes no picture of the smallest or the largest size.
    """
    contract, defaults = model.contract, model.defaults
    cells = side_pixels(contract, model.geometry)
    sides = contract.latents[-2:]
    ranges = []
    for cell, side, given, usual in zip(
        cells,
        sides,
        (options.height_range, options.width_range),
        (defaults.height, defaults.width),
        strict=True,
    ):
        most = usual * 3 // 2 // cell * cell
        if isinstance(side, int):
            least = most = usual
        else:
            least = max(cell, usual // 2 // cell * cell)
            most = min(
                [most, *(contract.limits[name] * cell for name in symbols([side]) if name in contract.limits)]
            )
        ranges.append(given or SizeRange(min=least, opt=usual, max=most))
    height, width = ranges
    for bound in ("min", "max"):
        pixels = {"height": getattr(height, bound), "width": getattr(width, bound)}
        picture_sizes(contract, model.geometry, **pixels, names=_RANGES)
    return height, width


def profile_shapes(spec: GraphSpec, profile: Profile) -> dict[str, Shapes]:
    """What a profile means for every input of a graph."""
    bounds: list[Sizes] = [
        {name: getattr(size, bound) for name, size in profile.items()} for bound in ("min", "opt", "max")
    ]
    return {
        tensor.name: (
            evaluate(tensor.dims, bounds[0]),
            evaluate(tensor.dims, bounds[1]),
            evaluate(tensor.dims, bounds[2]),
        )
        for tensor in spec.inputs
    }


def choose_profile(profiles: Sequence[Profile], sizes: Sizes, *, rebuild: Call) -> int:
    """Index of the profile that was tuned for the most similar call, among those that hold ``sizes``.

    Profiles of the denoiser differ in the rows an image has: two or three. A call with one picture inside
    the perturb window has three rows, which a profile for four pictures of two rows holds as well; so what
    decides is rows an image, not which profile is the narrowest. Where some images of a call are inside
    and as many are not, the first of both is taken.

    Args:
        profiles: Of one engine, from narrow to wide.
        sizes: Of one call.
        rebuild: Call that builds the engine anew, for the error.

    Raises:
        ContractError: Naming the size, its range and the parameter that widens it.
    """
    holding = [
        index
        for index, profile in enumerate(profiles)
        if all(profile[name].min <= size <= profile[name].max for name, size in sizes.items())
    ]
    if holding:
        rows = _rows_per_image(sizes)
        tuned = [_rows_per_image({name: size.opt for name, size in p.items()}) for p in profiles]
        return min(holding, key=lambda index: abs(tuned[index] - rows))
    widest = profiles[-1]
    name, size = next((n, s) for n, s in sizes.items() if not widest[n].min <= s <= widest[n].max)
    raise ContractError(
        f"{name} is {size} in this call, the engine was built for {widest[name].min} to "
        f"{widest[name].max}; widen it with `{_REMEDIES[name]}`",
        remedy=rebuild,
    )


def _rows_per_image(sizes: Sizes) -> float:
    return sizes.get("rows", 1) / sizes.get("tracked", 1)
