"""Contact sheets: the pictures of one prompt, settings below each other and seeds side by side."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from emag_export.evaluation.results import Results
from emag_export.evaluation.scoring import PictureScores, read_pixels

__all__ = ["contact_sheet", "write_contact_sheets"]

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
    pictures = [[_shown(read_pixels(path)) for path in row.paths] for row in rows]
    side = max(picture.height for row in pictures for picture in row)
    across = max(picture.width for row in pictures for picture in row)
    height = _LINE + 2 * _GAP + len(rows) * (side + _LINE + _GAP)
    width = max(2 * _GAP + max(map(len, pictures)) * (across + _GAP), 7 * len(prompt) + 2 * _GAP)
    sheet = Image.new("RGB", (width, height), _COLOURS[0])
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    pen.text((_GAP, _GAP), prompt, _COLOURS[1], font)
    top = _LINE + 2 * _GAP
    for row, drawn in zip(rows, pictures, strict=True):
        value = row.mean(quality)
        pen.text((_GAP, top), row.setting, _COLOURS[1], font)
        if value is not None:
            after = _GAP + pen.textlength(f"{row.setting}   ", font)
            pen.text((after, top), f"{quality} {value:.3g}", _COLOURS[2], font)
        for seed, picture in enumerate(drawn):
            sheet.paste(picture, (_GAP + seed * (across + _GAP), top + _LINE))
        top += side + _LINE + _GAP
    return sheet


def _shown(pixels: np.ndarray) -> Image.Image:
    picture = Image.fromarray(pixels)
    if min(picture.size) < _SMALLEST:
        factor = -(-_SMALLEST // min(picture.size))
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    picture.thumbnail((_LARGEST, _LARGEST))
    return picture
