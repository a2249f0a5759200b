"""Backends by name: which engine opens a component of a bundle."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from emag_export.bundle import Bundle
from emag_export.engines.config import EngineConfig
from emag_export.engines.tensorrt.flavour import FLAVOURS
from emag_export.errors import InputError
from emag_export.families.family import load

if TYPE_CHECKING:
    from emag_export.engines.protocol import Engine

__all__ = ["BACKENDS", "Backend", "EngineOpener", "open_backend"]

EngineOpener = Callable[[Bundle, str], "Engine"]
"""(bundle, component) to a running engine."""


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One row of the table."""

    opener: str
    """``module:function`` from (configuration, bundle) to an :data:`EngineOpener`, imported when it is
    used."""
    runs_on: tuple[str, ...]
    """Kinds of device, the default first."""
    takes: tuple[str, ...] = ()
    """Options of :class:`EngineConfig` that not every backend has."""
    needs_source: bool = False
    """Runs the source model, not a graph of the bundle."""
    summary: str


_TORCH = "emag_export.exporter.eager"

BACKENDS: Mapping[str, Backend] = MappingProxyType(
    {
        "onnxruntime": Backend(
            opener="emag_export.engines.ort:open_onnxruntime",
            runs_on=("cpu", "cuda"),
            takes=("threads", "provider"),
            summary="the bundle's graphs",
        ),
        **{
            name: Backend(
                opener="emag_export.engines.tensorrt.open:open_compiled",
                runs_on=("cuda",),
                takes=("weight_budget",),
                summary="engines compiled into the bundle",
            )
            for name in FLAVOURS
        },
        "torch": Backend(
            opener=f"{_TORCH}:open_torch",
            runs_on=("cpu", "cuda"),
            takes=("source",),
            needs_source=True,
            summary="the source model in PyTorch",
        ),
        "torch-compile": Backend(
            opener=f"{_TORCH}:open_torch_compile",
            runs_on=("cpu", "cuda"),
            takes=("source",),
            needs_source=True,
            summary="likewise compiled, which takes long in the first step of each kind",
        ),
    }
)
"""Everything that runs a denoiser."""

_NOT_EVERYWHERE = ("threads", "provider", "weight_budget")
"""Options that are refused where a backend has none. ``source`` only says where a model is, so it is not."""


def open_backend(config: EngineConfig, bundle: Bundle) -> EngineOpener:
    """A function that opens components of a bundle on a backend.

    Args:
        config: Which, and how.
        bundle: What will be opened; components that it shares with another one are opened from there.

    Raises:
        InputError: If there is no such backend, it does not run on the device, or does not take an option.
        MissingDependencyError: If its module is absent.
        EngineError: If there is no device for it.
        ModelError: If it needs the source model and that is not at hand.
    """
    backend = BACKENDS.get(config.backend)
    if backend is None:
        raise InputError(f"there is no `backend` {config.backend!r}; choose {', '.join(BACKENDS)}")
    device = config.device or backend.runs_on[0]
    if device.split(":")[0] not in backend.runs_on:
        raise InputError(
            f"{config.backend} runs on {' and '.join(backend.runs_on)}, not on {device}; leave out `device`"
        )
    for name in _NOT_EVERYWHERE:
        if getattr(config, name) != getattr(EngineConfig, name) and name not in backend.takes:
            others = " and ".join(other for other, row in BACKENDS.items() if name in row.takes)
            raise InputError(f"`{name}` is for {others}; {config.backend} takes none, leave it out")
    opener: EngineOpener = load(backend.opener)(replace(config, device=device), bundle)
    return opener
