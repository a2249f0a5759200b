"""How an engine is opened: one set of options for every command, server and test."""

from dataclasses import dataclass
from typing import TypedDict

from emag_export.errors import InputError

__all__ = ["EngineConfig", "EngineKeywords"]


class EngineKeywords(TypedDict, total=False):
    """Fields of :class:`EngineConfig`, for functions that pass them on."""

    backend: str
    device: str
    threads: int
    provider: str | None
    cuda_graphs: bool
    weight_budget: int | None
    source: str | None


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Options of a backend; what it does not know is refused where it differs from the default.

    :meth:`~emag_export.runtime.pipeline.Pipeline.open` takes the same as keywords.

    Examples:
        >>> from emag_export import Bundle, EngineConfig
        >>> from emag_export.engines.registry import open_backend
        >>> bundle = Bundle("bundle")
        >>> opener = open_backend(EngineConfig(backend="onnxruntime", threads=1), bundle)
        >>> with opener(bundle, "vae_decoder") as decoder:
        ...     decoder.name
        'onnxruntime (cpu)'
    """

    backend: str = "onnxruntime"
    """A name in :data:`~emag_export.engines.registry.BACKENDS`."""
    device: str = ""
    """``cpu``, ``cuda`` or ``cuda:1``; empty is the first that the backend runs on."""
    threads: int = 0
    """CPU threads; 0 lets the backend choose."""
    provider: str | None = None
    """Execution provider of onnxruntime on a GPU; None is CUDA's own."""
    cuda_graphs: bool = True
    """Capture calls and replay them, on a GPU."""
    weight_budget: int | None = None
    """MiB of weights that each TensorRT engine keeps on the GPU, where it streams them; None is what fits."""
    source: str | None = None
    """Where the source model is now, if it has moved, for backends that need it."""

    def __post_init__(self) -> None:
        if self.threads < 0:
            raise InputError(f"`threads` is {self.threads}; give 0 or more")
        if self.weight_budget is not None and self.weight_budget < 0:
            raise InputError(f"`weight_budget` is {self.weight_budget} MiB; give 0 or more")
