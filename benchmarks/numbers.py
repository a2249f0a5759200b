"""Single figures within sentences of README and docs, by the name of their mark.

A figure stands as ``<!-- number: NAME -->…<!-- / -->``; ``make tables`` writes what is between.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks import families, full_size
from benchmarks.evidence import numbers as evidence
from benchmarks.figures import hero
from benchmarks.figures.subject import counted, sd3
from benchmarks.memory import RESULTS as MEMORY
from benchmarks.results import load_results
from emag_export.families import FAMILIES
from emag_export.kinds import Variant
from emag_export.runtime.sampling.plan import Phase
from emag_export.tiny_sd3 import MODEL_DIR

__all__ = ["NUMBERS"]


def _exported(part: str, precision: str) -> dict[str, Any]:
    rows = load_results(full_size.RESULTS)["rows"]
    wanted = (part, precision, None)
    row = next(row for row in rows if (row["part"], row["precision"], row.get("scheme")) == wanted)
    made: dict[str, Any] = row["export"]
    return made


def _gb(part: str, precision: str) -> str:
    return f"{_exported(part, precision)['bytes'] / 1e9:.1f} GB"


def _memory_gb(part: str, precision: str) -> str:
    return f"{_exported(part, precision)['peak']['own'] / 1e9:.1f} GB"


def _relative(model: str) -> str:
    return f"{counted(model).cost.relative_to_own:.3f}"


def _average(model: str, variant: Variant, dtype: str = "float16") -> str:
    size = counted(model, variant).average_bytes(dtype)
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def _parameters(family: str, part: str) -> str:
    return f"{FAMILIES[family].parameters[part] / 1e9:.2f}"


def _half_precision(family: str, part: str) -> str:
    return f"{2 * FAMILIES[family].parameters[part] / 1e9:.1f} GB"


def _measured(what: str) -> str:
    """Of the first processor."""
    path = min(families.RESULTS.glob("*.json"))
    return f"{next(row['ratio'] for row in load_results(path)['rows'] if row['what'].startswith(what)):.2f}"


def _ratio(choose: Callable[[list[float]], float]) -> str:
    return f"{choose([case['ratio'] for case in load_results(MEMORY)['cases']]):.2f}"


def _embedded(folder: Path) -> str:
    return f"{sum(path.stat().st_size for path in folder.rglob('*') if path.is_file()) / 1e6:.0f} MB"


def _guided(model: str, phases: Sequence[Phase] = (Phase.GUIDE,)) -> str:
    return str(sum(phase in phases for phase in counted(model).phases))


NUMBERS: Mapping[str, Callable[[], str]] = MappingProxyType(
    {
        "fork": lambda: f"{sd3().cost.relative_to_cfg:.2f}",
        "two-pass": lambda: f"{sd3().cost.two_pass / sd3().cost.cfg:g}",
        **hero.NUMBERS,
        **evidence.NUMBERS,
        "tiny-sd3-size": partial(_embedded, MODEL_DIR),
        "sd3-map-average": partial(_average, "sd3", Variant.EMAG),
        "dit-parameters": partial(_parameters, "dit", "dit-xl-2-256"),
        "dit-fork": partial(_relative, "dit-xl-2-256"),
        "dit-planned": lambda: str(counted("dit-xl-2-256").cost.planned),
        "dit-cfg": lambda: str(counted("dit-xl-2-256").cost.cfg),
        "dit-guided": partial(_guided, "dit-xl-2-256"),
        "flux-parameters": partial(_parameters, "flux", "flux.1-dev"),
        "flux-size": partial(_gb, "flux.1-dev/transformer", "float16"),
        "flux-export-memory": partial(_memory_gb, "flux.1-dev/transformer", "float16"),
        "flux-fork": partial(_relative, "flux.1-dev"),
        "flux-fork-cfg": lambda: f"{counted('flux.1-dev').cost_with('emag').relative_to_cfg:.3f}",
        "flux-measured": partial(_measured, "Flux.1"),
        "z-image-size": partial(_gb, "z-image/transformer", "bfloat16"),
        "z-image-parameters": partial(_parameters, "z_image", "z-image"),
        "z-image-text-parameters": partial(_parameters, "z_image", "text_encoder"),
        "z-image-fork": partial(_relative, "z-image"),
        "z-image-turbo-fork": partial(_relative, "z-image-turbo"),
        "z-image-turbo-averaged": partial(_guided, "z-image-turbo", (Phase.TRACK, Phase.GUIDE)),
        "z-image-query-average": partial(_average, "z-image", Variant.EMAG_Q),
        "z-image-map-average": partial(_average, "z-image", Variant.EMAG),
        "qwen-image-parameters": partial(_parameters, "qwen_image", "qwen-image"),
        "qwen-image-size": partial(_half_precision, "qwen_image", "qwen-image"),
        "qwen-image-fork": partial(_relative, "qwen-image"),
        "qwen-image-planned": lambda: str(counted("qwen-image").cost.planned),
        "qwen-image-cfg": lambda: str(counted("qwen-image").cost.cfg),
        "qwen-image-guided": partial(_guided, "qwen-image"),
        "qwen-image-query-average": partial(_average, "qwen-image", Variant.EMAG_Q),
        "qwen-image-query-average-float32": partial(_average, "qwen-image", Variant.EMAG_Q, "float32"),
        "qwen-image-map-average": partial(_average, "qwen-image", Variant.EMAG),
        "qwen-image-map-average-float32": partial(_average, "qwen-image", Variant.EMAG, "float32"),
        "memory-cases": lambda: str(len(load_results(MEMORY)["cases"])),
        "memory-least": partial(_ratio, min),
        "memory-most": partial(_ratio, max),
    }
)
"""Name to the figure as it is written."""
