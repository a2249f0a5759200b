"""Pictures side by side, with labels."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill

import numpy as np
from jaxtyping import UInt8

__all__ = ["save_gallery"]

_CELL_INCHES = 1.7
_DPI = 110


def save_gallery(
    columns: Mapping[str, UInt8[np.ndarray, "rows height width 3"]], rows: Sequence[str], path: Path
) -> None:
    """Write a grid of pictures as PNG.

    Args:
        columns: Label to its pictures, one per row.
        rows: Label of each row, for example its prompt.
        path: The PNG file.
    """
    from matplotlib.figure import Figure

    figure = Figure(
        figsize=((len(columns) + 1.1) * _CELL_INCHES, len(rows) * _CELL_INCHES + 0.4), layout="constrained"
    )
    axes = figure.subplots(
        len(rows), len(columns) + 1, squeeze=False, width_ratios=[1.1] + [1] * len(columns)
    )
    for row, label in zip(axes, rows, strict=True):
        for axis in row:
            axis.axis("off")
        row[0].text(1, 0.5, fill(label, 20), ha="right", va="center", fontsize=8, transform=row[0].transAxes)
    for column, (label, pictures) in enumerate(columns.items(), start=1):
        axes[0][column].set_title(label, fontsize=10)
        for row, picture in zip(axes, pictures, strict=True):
            row[column].imshow(picture, interpolation="nearest")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DPI)
