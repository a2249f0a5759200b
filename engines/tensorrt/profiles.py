"""Optimisation profiles: for every named dimension the sizes an engine is built for, from the contract."""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from emag_export.bundle import DENOISER
from emag_export.contract import DenoiserContract, GraphSpec
from emag_export.engines.tensorrt.flavour import Flavour
from emag_export.engines.tensorrt.options import EngineOptions, SizeRange
from emag_export.errors import ContractError, InputError
from emag_export.models import SamplingDefaults
from emag_export.shapes import Sizes, evaluate

__all__ = ["Profile", "Shapes", "Sized", "choose_profile", "profile_shapes", "profiles_of"]

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
    "text": "--max-sequence-length",
    "tokens": "--max-sequence-length",
}
_BRANCHES = 3
"""Branch rows of one image at most: unconditional, conditional, perturbed."""


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
    def vae_factor(self) -> int:
        """Pixels per latent along a side."""

    @property
    def clip_tokens(self) -> int:
        """Tokens that CLIP makes of every prompt."""


def profiles_of(
    model: Sized, spec: GraphSpec, options: EngineOptions, flavour: Flavour
) -> tuple[Profile, ...]:
    """The profiles one component is built with.

    The denoiser is called with two rows an image outside the perturb window and with three inside.
    Where kernels are chosen for a profile's optimum, each of the two gets a profile.

    Raises:
        InputError: If a resolution does not fit the model.
    """
    height, width = _resolution(model, options)
    images = options.max_images
    if spec.name != DENOISER:
        # Prompts are encoded, and pictures decoded, one by one: their neighbours shall not change them.
        ranges = {"rows": _up_to(1)}
        ranges |= {"tokens": _up_to(model.defaults.max_sequence_length)}
        ranges |= {
            "h": height.divided(model.vae_factor, "height"),
            "w": width.divided(model.vae_factor, "width"),
        }
        return ({name: ranges[name] for name in spec.symbols},)
    cell = model.vae_factor * model.contract.patch_size
    text = model.clip_tokens + model.defaults.max_sequence_length
    shared = {
        "trunk_rows": _up_to(2 * images),
        "tracked": _up_to(images),
        "h": height.divided(cell, "height"),
        "w": width.divided(cell, "width"),
        "text": SizeRange(min=model.clip_tokens, opt=text, max=text),
    }
    rows = [_up_to(_BRANCHES * images)]
    if flavour.profile_per_row_count:
        rows.insert(0, _up_to(2 * images))
    return tuple({name: {**shared, "rows": r}[name] for name in spec.symbols} for r in rows)


def _up_to(most: int) -> SizeRange:
    return SizeRange(min=1, opt=most, max=most)


def _resolution(model: Sized, options: EngineOptions) -> tuple[SizeRange, SizeRange]:
    cell = model.vae_factor * model.contract.patch_size
    limit = model.contract.max_grid * cell
    ranges = []
    for name, given, usual in (
        ("height", options.height, model.defaults.height),
        ("width", options.width, model.defaults.width),
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
    raise ContractError(
        f"{name} is {size} in this call, the engine was built for {widest[name].min} to "
        f"{widest[name].max}; widen it with {_REMEDIES[name]}: {rebuild}"
    )
