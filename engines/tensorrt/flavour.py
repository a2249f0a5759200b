"""TensorRT and TensorRT-RTX: everything in which the two differ, in one table."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType, ModuleType

from emag_export.errors import EngineError, InputError, MissingDependencyError

__all__ = ["CURRENT", "FLAVOURS", "Flavour", "capability_of", "flavour_of"]

CURRENT = "current"
"""The target that is the GPU of this machine."""

_TOO_OLD = "{found} is too old: {backend} {minimum} or newer is needed; {install}"


@dataclass(frozen=True, kw_only=True)
class Flavour:
    """One of the two modules, which share their Python API."""

    backend: str
    """Its name as a backend."""
    module: str
    minimum: tuple[int, int]
    install: str
    """What to type when it is missing."""
    targets: tuple[str, ...]
    """Compute capabilities it can build for without that GPU."""
    runs_from: tuple[int, int]
    """Oldest compute capability it runs on. Whether it takes a newer one, its probe finds out."""
    refuses: Mapping[str, str] = field(default_factory=dict)
    """Build option to why this module does not take it."""
    needs_gpu: Mapping[str, str] = field(default_factory=dict)
    """Build option to why the build itself then needs a GPU."""
    profile_per_row_count: bool
    """Whether a profile's optimum decides which kernels are built, so that several of them pay."""
    captures_graphs_itself: bool
    """Whether the execution context keeps CUDA graphs, with kernels that it specialises at run time."""

    def load(self) -> ModuleType:
        """Import the module.

        Raises:
            MissingDependencyError: If it is absent, with the pip command.
            EngineError: If it is too old.
        """
        try:
            module = importlib.import_module(self.module)
        except (ImportError, OSError) as error:
            reason = "is not installed" if isinstance(error, ModuleNotFoundError) else f"fails ({error})"
            raise MissingDependencyError(f"{self.module} {reason}; {self.install}") from error
        found = str(module.__version__)
        if tuple(int(part) for part in found.split(".")[:2]) < self.minimum:
            minimum = ".".join(map(str, self.minimum))
            raise EngineError(
                _TOO_OLD.format(found=found, backend=self.backend, minimum=minimum, install=self.install)
            )
        return module

    def without_gpu(self) -> str:
        """What to do where a build would need the GPU of this machine and there is none."""
        if not self.targets:
            return "build with `backend` tensorrt-rtx and name the GPU with `targets`"
        return f"name the GPU to build for with `targets`: {', '.join(self.targets)}"

    def version(self) -> str:
        """Version of the installed module; importing it loads its libraries but touches no GPU."""
        return str(self.load().__version__)

    def check_gpu(self, name: str, capability: tuple[int, int]) -> None:
        """Refuse a GPU that is too old for this module.

        Args:
            name: Of the GPU.
            capability: Its compute capability.

        Raises:
            EngineError: Naming what it needs, and what runs on this GPU instead.
        """
        if capability < self.runs_from:
            oldest = "{}.{}".format(*self.runs_from)
            raise EngineError(
                f"{name} has compute capability {capability[0]}.{capability[1]}, {self.backend} needs "
                f"{oldest} or newer; use `backend` onnxruntime with `device` cuda"
            )

    def check_targets(self, targets: tuple[str, ...]) -> None:
        """Refuse targets this module cannot build for.

        Raises:
            InputError: Naming what it can build for.
        """
        for target in targets:
            if target != CURRENT and target not in self.targets:
                known = ", ".join((CURRENT, *self.targets))
                other = next((f.backend for f in FLAVOURS.values() if target in f.targets), None)
                hint = (
                    f"`backend` {other}"
                    if other
                    else f"`backend` tensorrt with `targets` {CURRENT} on that GPU"
                )
                raise InputError(f"{self.backend} builds for {known}, not for {target!r}; use {hint}")
        if CURRENT in targets and len(targets) > 1:
            raise InputError(f"{CURRENT} cannot be combined with other targets; build them one by one")


# The GPUs of the support matrices of TensorRT-RTX 1.4 to 1.7: Turing, Ampere (GA10x), Ada, Blackwell. Its
# ComputeCapability has SM80 as well, but no matrix lists the A100 (8.0), nor any Hopper GPU (9.0).
_RTX_SMS = ("sm75", "sm86", "sm89", "sm120", "sm121")

FLAVOURS: Mapping[str, Flavour] = MappingProxyType(
    {
        "tensorrt": Flavour(
            backend="tensorrt",
            module="tensorrt",
            minimum=(10, 13),
            install="pip install tensorrt (CUDA 13), or tensorrt-cu12 with a CUDA 12 driver",
            targets=(),
            runs_from=(7, 5),
            profile_per_row_count=True,
            captures_graphs_itself=False,
        ),
        # Without a GPU, a refittable build fails in its compiler ("CHECK(status == CUDA_SUCCESS)"); version
        # compatibility wants a library it has not got.
        "tensorrt-rtx": Flavour(
            backend="tensorrt-rtx",
            module="tensorrt_rtx",
            minimum=(1, 4),
            install="pip install tensorrt-rtx (needs a driver for CUDA 12.9 or newer)",
            targets=_RTX_SMS,
            runs_from=(7, 5),
            refuses=MappingProxyType(
                {
                    "version_compatible": "its plans run with the version that built them only",
                    "hardware_compatible": "name several GPUs with `targets` instead",
                    "timing_cache": "it compiles kernels when an engine first runs and times none at build",
                }
            ),
            needs_gpu=MappingProxyType(
                {
                    "refittable": "its compiler asks the GPU when weights are to be exchangeable",
                    "strip_weights": "its compiler asks the GPU when weights are to be exchangeable",
                }
            ),
            profile_per_row_count=False,
            captures_graphs_itself=True,
        ),
    }
)


def capability_of(target: str) -> tuple[int, int]:
    """Compute capability of a target: (8, 9) for ``sm89``."""
    return divmod(int(target.removeprefix("sm")), 10)


def flavour_of(backend: str) -> Flavour:
    """The flavour with this backend name.

    Raises:
        InputError: If there is none.
    """
    if backend not in FLAVOURS:
        raise InputError(f"there is no engine builder {backend!r}; choose {', '.join(FLAVOURS)}")
    return FLAVOURS[backend]
