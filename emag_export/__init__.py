"""Export diffusion transformers with EMAG guidance to ONNX and TensorRT, and run them.

    import emag_export as emag

    emag.build("tiny-sd3", "bundle")
    with emag.Pipeline.open("bundle") as pipeline:
        pipeline.generate("a large red circle on a blue background", seed=1)[0].save("circle.png")

Importing this package is free: no torch, no I/O, no environment. Names are imported when they are first used.
The rooms below are :mod:`emag_export.families`, :mod:`emag_export.exporter`, :mod:`emag_export.engines`,
:mod:`emag_export.runtime`, :mod:`emag_export.reference`, :mod:`emag_export.diffusers_guidance`,
:mod:`emag_export.bench` and :mod:`emag_export.cli`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from emag_export.version import VERSION

if TYPE_CHECKING:
    from emag_export.api import build, compile
    from emag_export.bundle import Bundle
    from emag_export.diffusers_guidance.guider import EMAGuidance
    from emag_export.diffusers_guidance.pipeline import guide_pipeline
    from emag_export.engines.config import EngineConfig
    from emag_export.errors import EmagError
    from emag_export.kinds import Renorm, Variant
    from emag_export.options import Lora
    from emag_export.progress import Event
    from emag_export.runtime.pipeline import Pipeline

__version__ = VERSION

__all__ = [
    "Bundle",
    "EMAGuidance",
    "EmagError",
    "EngineConfig",
    "Event",
    "Lora",
    "Pipeline",
    "Renorm",
    "Variant",
    "__version__",
    "build",
    "compile",
    "guide_pipeline",
]


_HOMES = {
    "Bundle": "bundle",
    "EMAGuidance": "diffusers_guidance.guider",
    "EmagError": "errors",
    "EngineConfig": "engines.config",
    "Event": "progress",
    "Lora": "options",
    "Pipeline": "runtime.pipeline",
    "Renorm": "kinds",
    "Variant": "kinds",
    "build": "api",
    "compile": "api",
    "guide_pipeline": "diffusers_guidance.pipeline",
}
"""Public name to the module that defines it."""


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
