"""Single figures within sentences of README and docs, by the name of their mark.

A figure stands as ``<!-- number: NAME -->…<!-- / -->``; ``make tables`` writes what is between.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks import full_size
from benchmarks.evidence.__main__ import RESULTS as EVIDENCE
from benchmarks.figures import hero
from benchmarks.figures.subject import counted, sd3
from benchmarks.memory import RESULTS as MEMORY
from benchmarks.results import load_results
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


def _cost_of_suite(setting: str) -> str:
    settings = load_results(EVIDENCE / "tiny-sd3.json")["results"]["settings"]
    return f"{next(row['row_blocks_relative_to_cfg'] for row in settings if row['label'] == setting):.3g}"


def _ratio(choose: Callable[[list[float]], float]) -> str:
    return f"{choose([case['ratio'] for case in load_results(MEMORY)['cases']]):.2f}"


def _embedded(folder: Path) -> str:
    return f"{sum(path.stat().st_size for path in folder.rglob('*') if path.is_file()) / 1e6:.0f} MB"


NUMBERS: Mapping[str, Callable[[], str]] = MappingProxyType(
    {
        "fork": lambda: f"{sd3().cost.relative_to_cfg:.2f}",
        "two-pass": lambda: f"{sd3().cost.two_pass / sd3().cost.cfg:g}",
        **hero.NUMBERS,
        "tiny-sd3-size": partial(_embedded, MODEL_DIR),
        "flux-size": partial(_gb, "flux.1-dev/transformer", "float16"),
        "flux-export-memory": partial(_memory_gb, "flux.1-dev/transformer", "float16"),
        "z-image-size": partial(_gb, "z-image/transformer", "bfloat16"),
        "flux-fork": partial(_relative, "flux.1-dev"),
        "z-image-fork": partial(_relative, "z-image"),
        "qwen-image-fork": partial(_relative, "qwen-image"),
        "tiny-sd3-emag-q-cost": partial(_cost_of_suite, "emag@emag-q, w 4, s 1.5"),
        "tiny-sd3-slg-cost": partial(_cost_of_suite, "slg, w 4, s 1.7"),
        "memory-cases": lambda: str(len(load_results(MEMORY)["cases"])),
        "memory-least": partial(_ratio, min),
        "memory-most": partial(_ratio, max),
    }
)
"""Name to the figure as it is written."""
