"""The drawings by name, and their files."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from xml.etree.ElementTree import Element

from benchmarks.figures.architecture import architecture
from benchmarks.figures.cost import cost_bars
from benchmarks.figures.fork import fork_grid
from benchmarks.figures.negatives import negative_maps
from benchmarks.figures.phases import phase_strip
from benchmarks.figures.state import state_turns
from benchmarks.figures.svg import Palette, to_text

__all__ = ["FIGURES", "file_of", "written"]

FIGURES: Mapping[str, Callable[[Palette], Element]] = MappingProxyType(
    {
        "architecture": architecture,
        "cost": cost_bars,
        "fork": fork_grid,
        "negatives": negative_maps,
        "phases": phase_strip,
        "state": state_turns,
    }
)


def file_of(name: str, palette: Palette) -> Path:
    """From the root of the repository."""
    return Path("docs/images") / f"{name}-{palette.name}.svg"


def written(name: str, palette: Palette) -> str:
    """Content of the file."""
    return to_text(FIGURES[name](palette))
