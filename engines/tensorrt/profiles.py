"""Optimisation profiles: for every named dimension the sizes an engine is built for, from the contract."""

from collections.abc import Mapping, Sequence

from emag_export.bundle import DENOISER, Bundle
from emag_export.contract import GraphSpec
from emag_export.engines.tensorrt.flavour import Flavour
from emag_export.engines.tensorrt.options import EngineOptions, SizeRange
from emag_export.errors import ContractError, InputError
from emag_export.shapes import Sizes, evaluate

__all__ = ["Profile", "Shapes", "choose_profile", "profile_shapes", "profiles_of"]

Profile = Mapping[str, SizeRange]
"""Range of every named dimension of one graph."""

Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Smallest, optimal and largest shape of one input."""

_REMEDIES = {
    "rows": "--max-images",
    "trunk_rows": "--max-images",
    "tracked": "--max-images",
    "h": "--height",
    "w": "--width",
}
_BRANCHES = 3
"""Branch rows of one image at most: unconditional, conditional, perturbed."""


def profiles_of(
    bundle: Bundle, component: str, options: EngineOptions, flavour: Flavour
) -> tuple[Profile, ...]:
    """The profiles one component is built with.

    The denoiser is called with two rows an image outside the perturb window and with three inside.
    Where kernels are chosen for a profile's optimum, each of the two gets a profile.

    Raises:
        InputError: If a resolution does not fit the model.
    """
    height, width = _resolution(bundle, options)
    spec, images = bundle.spec(component), options.max_images
    if component != DENOISER:
        ranges = {"rows": _up_to(1 if component == "vae_decoder" else images)}
        ranges |= {"tokens": _up_to(bundle.defaults.max_sequence_length)}
        ranges |= {
            "h": height.divided(bundle.vae_factor, "height"),
            "w": width.divided(bundle.vae_factor, "width"),
        }
        return ({name: ranges[name] for name in spec.symbols},)
    cell = bundle.vae_factor * bundle.contract.patch_size
    text = bundle.clip_tokens + bundle.defaults.max_sequence_length
    shared = {
        "trunk_rows": _up_to(2 * images),
        "tracked": _up_to(images),
        "h": height.divided(cell, "height"),
        "w": width.divided(cell, "width"),
        "text": SizeRange(min=bundle.clip_tokens, opt=text, max=text),
    }
    rows = [_up_to(_BRANCHES * images)]
    if flavour.profile_per_row_count:
        rows.insert(0, _up_to(2 * images))
    return tuple({name: {**shared, "rows": r}[name] for name in spec.symbols} for r in rows)


def _up_to(most: int) -> SizeRange:
    return SizeRange(min=1, opt=most, max=most)


def _resolution(bundle: Bundle, options: EngineOptions) -> tuple[SizeRange, SizeRange]:
    cell = bundle.vae_factor * bundle.contract.patch_size
    limit = bundle.contract.max_grid * cell
    ranges = []
    for name, given, usual in (
        ("height", options.height, bundle.defaults.height),
        ("width", options.width, bundle.defaults.width),
    ):
        wanted = given or SizeRange(
            min=max(cell, usual // 2 // cell * cell), opt=usual, max=min(limit, usual * 3 // 2 // cell * cell)
        )
        if wanted.max > limit:
            raise InputError(
                f"{name} {wanted.max} is more than this model's positional embedding covers: {limit}"
            )
        ranges.append(wanted)
    return ranges[0], ranges[1]


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


def choose_profile(profiles: Sequence[Profile], sizes: Sizes, *, rebuild: str) -> int:
    """Index of the first profile that holds ``sizes``; profiles are ordered from narrow to wide.

    Args:
        profiles: Of one engine.
        sizes: Of one call.
        rebuild: Command that builds the engine anew, for the error.

    Raises:
        ContractError: Naming the size, its range and the option that widens it.
    """
    for index, profile in enumerate(profiles):
        if all(profile[name].min <= size <= profile[name].max for name, size in sizes.items()):
            return index
    widest = profiles[-1]
    name, size = next((n, s) for n, s in sizes.items() if not widest[n].min <= s <= widest[n].max)
    remedy = _REMEDIES.get(name)
    advice = f"widen it with {remedy}: {rebuild}" if remedy else f"use a length within it, or: {rebuild}"
    raise ContractError(
        f"{name} is {size} in this call, the engine was built for {widest[name].min} to "
        f"{widest[name].max}; {advice}"
    )
