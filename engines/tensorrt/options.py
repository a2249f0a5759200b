"""What the user may choose when engines are built, and the check that the choice makes sense."""

from dataclasses import dataclass
from typing import Self

from emag_export.engines.tensorrt.flavour import CURRENT, Flavour
from emag_export.errors import InputError

__all__ = ["DEFAULT_IMAGES", "DEFAULT_IMAGES_OF_MAPS", "EngineOptions", "SizeRange"]

DEFAULT_IMAGES = 4
DEFAULT_IMAGES_OF_MAPS = 1
"""Attention maps of one picture of 1024 pixels already take gigabytes."""


@dataclass(frozen=True, kw_only=True)
class SizeRange:
    """Smallest, most usual and largest value of one size."""

    min: int
    opt: int
    max: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``"1024"`` or ``"512:1024:1536"``.

        Raises:
            InputError: If it is neither, or not ascending.
        """
        try:
            numbers = [int(part) for part in text.split(":")]
        except ValueError:
            numbers = []
        if len(numbers) == 1:
            numbers *= 3
        if len(numbers) != 3 or not 0 < numbers[0] <= numbers[1] <= numbers[2]:
            raise InputError(
                f"{text!r} is no range of sizes; write 1024, or 512:1024:1536 for least, usual, most"
            )
        return cls(min=numbers[0], opt=numbers[1], max=numbers[2])

    def divided(self, divisor: int, name: str) -> Self:
        """The range in units of ``divisor``.

        Raises:
            InputError: If a bound is no multiple of it.
        """
        for bound in (self.min, self.opt, self.max):
            if bound % divisor:
                nearest = max(1, round(bound / divisor)) * divisor
                raise InputError(f"`{name}` {bound} is no multiple of {divisor}; take {nearest}")
        return type(self)(min=self.min // divisor, opt=self.opt // divisor, max=self.max // divisor)


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Targets, ranges and flags of a build; all of it is part of the key of a plan."""

    targets: tuple[str, ...] = (CURRENT,)
    max_images: int | None = None
    """Images in one call. None is :data:`DEFAULT_IMAGES`, :data:`DEFAULT_IMAGES_OF_MAPS` for variants that
    average maps, and fewer where the averages would have more elements than a tensor may have."""
    height_range: SizeRange | None = None
    """Pixels; None is half to one and a half times the bundle's own size, less where the averages of one
    image would have more elements than a tensor may have."""
    width_range: SizeRange | None = None
    refittable: bool = False
    """Weights can be exchanged later."""
    strip_weights: bool = False
    """Leave the weights out of the plan; they are read from the bundle's ONNX when it is loaded."""
    weight_streaming: bool = False
    """Weights may stay in host memory and be streamed, for GPUs they do not fit on."""
    version_compatible: bool = False
    """Run with later versions of the same major one, at some cost in speed."""
    hardware_compatible: bool = False
    """Run on GPUs of Ampere and newer, at some cost in speed."""
    tf32: bool = True
    """Let float32 matrix products use TF32."""
    workspace: int | None = None
    """MiB of scratch memory at most."""
    optimization_level: int | None = None
    """0 builds fastest, 5 searches longest."""
    timing_cache: bool = False
    """Keep kernel timings beside the plans, so that similar builds are faster."""

    def __post_init__(self) -> None:
        if self.max_images is not None and self.max_images < 1:
            raise InputError(f"`max_images` is {self.max_images}; give at least 1")
        if self.optimization_level is not None and not 0 <= self.optimization_level <= 5:
            raise InputError(f"`optimization_level` is {self.optimization_level}; it goes from 0 to 5")
        if self.workspace is not None and self.workspace < 1:
            raise InputError(f"`workspace` is {self.workspace} MiB; give at least 1")

    def check(self, flavour: Flavour) -> None:
        """Refuse what ``flavour`` cannot do, before anything is built.

        Raises:
            InputError: Naming the option and the reason.
        """
        flavour.check_targets(self.targets)
        for option, reason in flavour.refuses.items():
            if getattr(self, option):
                raise InputError(f"{flavour.backend} takes no `{option}`: {reason}")
        for option, reason in flavour.needs_gpu.items():
            if getattr(self, option) and CURRENT not in self.targets:
                raise InputError(
                    f"{flavour.backend} builds with `{option}` on the GPU itself only: {reason}; use "
                    "`targets` "
                    f"{CURRENT} there"
                )
