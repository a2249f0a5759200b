"""Contact sheets: the pictures of one prompt, settings below each other and seeds side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from emag_export.evaluation.metrics.protocol import Pixels
from emag_export.evaluation.pixels import read_pixels
from emag_export.evaluation.results import Results
from emag_export.evaluation.scoring import PictureScores

__all__ = ["SheetRow", "contact_sheet", "sheet", "write_contact_sheets"]

_SMALLEST = 128
"""Pixels; smaller pictures are shown with whole pixels repeated."""
_LARGEST = 384
_GAP = 6
_LINE = 18
_COLOURS = ("#ffffff", "#1c1e21", "#5f6670")
"""Of the sheet, the labels, and the quality."""


def write_contact_sheets(results: Results, folder: Path) -> list[Path]:
    """One PNG per prompt, numbered as in the results.

    Args:
        results: With pictures.
        folder: Made if missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for number, prompt in enumerate(results.prompts):
        rows = [row for row in results.pictures if row.prompt == number]
        path = folder / f"{number:04d}.png"
        contact_sheet(prompt, rows, results.quality).save(path)
        written.append(path)
    return written


def contact_sheet(prompt: str, rows: Sequence[PictureScores], quality: str) -> Image.Image:
    """The pictures of one prompt.

    Args:
        prompt: Stands above.
        rows: One per setting.
        quality: Column whose mean stands beside each setting.
    """
    values = [row.mean(quality) for row in rows]
    return sheet(
        prompt,
        [
            SheetRow(
                label=row.setting,
                note="" if value is None else f"{quality} {value:.3g}",
                pictures=[read_pixels(path) for path in row.paths],
            )
            for row, value in zip(rows, values, strict=True)
        ],
    )


@dataclass(frozen=True, kw_only=True)
class SheetRow:
    """Pictures side by side, and what stands above them."""

    label: str
    note: str = ""
    """Beside the label, paler."""
    pictures: Sequence[Pixels]


def sheet(title: str, rows: Sequence[SheetRow]) -> Image.Image:
    """Rows of pictures below each other; small pictures are shown with whole pixels repeated.

    Args:
        title: Stands above.
        rows: At least one, each with at least one picture.
    """
    pictures = [[_shown(pixels) for pixels in row.pictures] for row in rows]
    side = max(picture.height for row in pictures for picture in row)
    across = max(picture.width for row in pictures for picture in row)
    font = ImageFont.load_default(13)
    texts = [title, *(f"{row.label}   {row.note}" for row in rows)]
    height = _LINE + 2 * _GAP + len(rows) * (side + _LINE + _GAP)
    wide = [2 * _GAP + max(map(len, pictures)) * (across + _GAP)]
    width = max(*wide, *(int(font.getlength(text)) + 2 * _GAP for text in texts))
    made = Image.new("RGB", (width, height), _COLOURS[0])
    pen = ImageDraw.Draw(made)
    pen.text((_GAP, _GAP), title, _COLOURS[1], font)
    top = _LINE + 2 * _GAP
    for row, drawn in zip(rows, pictures, strict=True):
        pen.text((_GAP, top), row.label, _COLOURS[1], font)
        after = _GAP + pen.textlength(f"{row.label}   ", font)
        pen.text((after, top), row.note, _COLOURS[2], font)
        for place, picture in enumerate(drawn):
            made.paste(picture, (_GAP + place * (across + _GAP), top + _LINE))
        top += side + _LINE + _GAP
    return made


def _shown(pixels: Pixels) -> Image.Image:
    picture = Image.fromarray(pixels)
    if min(picture.size) < _SMALLEST:
        factor = -(-_SMALLEST // min(picture.size))
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    picture.thumbnail((_LARGEST, _LARGEST))
    return picture
