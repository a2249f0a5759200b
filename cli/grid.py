"""``generate --grid``: the same pictures by several methods, and a sheet of all of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from emag_export.bundle import Bundle
from emag_export.runtime.keywords import amended
from emag_export.runtime.request import GenerationRequest

if TYPE_CHECKING:
    from emag_export.evaluation.settings import Setting

__all__ = ["SHEET", "Cell", "grid_cells", "write_sheet"]

SHEET = "grid.png"
"""Its name in the folder of the pictures."""

Cell = tuple["Setting", GenerationRequest, Path]
"""A picture of the grid, and where it goes below the folder."""


def grid_cells(
    bundle: Bundle,
    requests: Sequence[GenerationRequest],
    methods: str,
    scales: tuple[float | None, float | None],
) -> list[Cell]:
    """Every picture by every method, method by method.

    Args:
        bundle: Draws all of them.
        requests: Pictures as they would be drawn without a grid.
        methods: Names as for ``eval``.
        scales: w and s of every method that has them; None is the bundle's.

    Raises:
        InputError: If there is no such method, or it needs another variant.
    """
    from emag_export.evaluation.methods import methods_named
    from emag_export.evaluation.settings import settings_of

    given = [() if scale is None else (scale,) for scale in scales]
    settings = settings_of(methods_named(methods), [bundle], *given)
    return [
        (
            setting,
            amended(request, setting.keywords),
            Path(setting.folder) / f"{index:04d}-seed{request.seed}.png",
        )
        for setting in settings
        for index, request in enumerate(requests)
    ]


def write_sheet(cells: Sequence[Cell], folder: Path) -> Path:
    """Lay the pictures out: methods below each other, prompts and seeds side by side.

    Args:
        cells: All are drawn.
        folder: They lie below it.
    """
    from emag_export.evaluation.contact import SheetRow, sheet
    from emag_export.evaluation.pixels import read_pixels

    rows: dict[str, list[Path]] = {}
    for setting, _, path in cells:
        rows.setdefault(setting.label, []).append(folder / path)
    prompts = list(dict.fromkeys(str(request.prompt) for _, request, _ in cells))
    title = prompts[0] if len(prompts) == 1 else f"{prompts[0]}, and {len(prompts) - 1} more"
    made = sheet(
        title,
        [
            SheetRow(label=label, pictures=[read_pixels(path) for path in paths])
            for label, paths in rows.items()
        ],
    )
    made.save(folder / SHEET, optimize=True)
    return folder / SHEET
