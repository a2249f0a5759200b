"""Pictures on disk: PNG files that remember every parameter, so that any of them can be made again."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from emag_export.bundle import Bundle
from emag_export.errors import InputError
from emag_export.kinds import Variant
from emag_export.manifest import LoraRecord, weights_of
from emag_export.records import FORMAT_VERSION, dump_record, read_record
from emag_export.runtime.request import GenerationRequest
from emag_export.version import VERSION

__all__ = ["Picture", "PictureRecord", "make_picture", "read_picture_record", "save_picture"]

_KEY = "emag-export"


@dataclass(frozen=True, kw_only=True)
class PictureRecord:
    """What a PNG says about how it was made."""

    format_version: int = FORMAT_VERSION
    version: str = VERSION
    """Of emag-export."""
    request: GenerationRequest
    model: str
    variant: Variant
    fingerprint: str
    """Of the source model."""
    loras: tuple[LoraRecord, ...] = ()
    """Merged into it."""
    precision: str
    """Of the bundle, with its quantisation."""
    engine: str

    def same_weights(self, bundle: Bundle) -> bool:
        """Whether a bundle has the weights that drew the picture, LoRAs included."""
        return weights_of(self.fingerprint, self.loras) == bundle.provenance.weights

    def made_by(self, bundle: Bundle, request: GenerationRequest) -> bool:
        """Whether a bundle makes this picture of a request, up to what its engine rounds."""
        drawn = (self.request, self.variant, self.precision)
        wanted = (request, bundle.contract.variant, bundle.described_precision)
        return drawn == wanted and self.same_weights(bundle)


class Picture(Image.Image):
    """A PIL image that knows how it was made: :attr:`info` holds it, and every PNG that it is saved to."""

    def save(self, fp: Any, format: str | None = None, **options: Any) -> None:
        """As PIL saves; a PNG gets the parameters as text chunks."""
        name = Path(fp).suffix.lower() if isinstance(fp, str | os.PathLike) else ""
        if "pnginfo" not in options and (
            (format or "").upper() == "PNG" or (format is None and name == ".png")
        ):
            options["pnginfo"] = _chunks(self.info)
        super().save(fp, format, **options)


_TEXTS = ("Description", "Software", _KEY)


def _chunks(info: Mapping[str | tuple[int, int], Any]) -> PngInfo:
    chunks = PngInfo()
    for name in _TEXTS:
        if name in info:
            chunks.add_itxt(name, info[name])
    return chunks


def make_picture(
    pixels: UInt8[np.ndarray, "height width 3"], bundle: Bundle, request: GenerationRequest, engine: str
) -> Picture:
    """A picture with its parameters.

    Args:
        pixels: 8-bit sRGB.
        bundle: It was made with.
        request: It was made from.
        engine: Name of the engine that made it.
    """
    record = PictureRecord(
        request=request,
        model=bundle.provenance.model,
        variant=bundle.contract.variant,
        fingerprint=bundle.provenance.fingerprint,
        loras=bundle.provenance.loras,
        precision=bundle.described_precision,
        engine=engine,
    )
    image: Any = Image.fromarray(pixels)
    image.__class__ = Picture  # PIL's constructors make plain images only
    image.info |= {
        "Description": request.prompt,
        "Software": f"emag-export {VERSION}",
        _KEY: dump_record(record),
    }
    picture: Picture = image
    return picture


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG; it appears whole or not at all.

    Args:
        picture: Any image.
        path: Where to; missing folders are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    picture.save(partial, format="PNG")
    partial.replace(path)


def read_picture_record(path: Path) -> PictureRecord:
    """What :func:`save_picture` wrote.

    Args:
        path: A PNG.

    Raises:
        InputError: If the file is no PNG of ours.
        BundleError: If its record is damaged or of another version.
    """
    try:
        with Image.open(path) as image:
            image.load()
            text = image.info.get(_KEY)
    except (OSError, UnidentifiedImageError) as error:
        raise InputError(f"{path} cannot be read as a picture: {error}") from error
    if text is None:
        raise InputError(
            f"{path} holds no emag-export parameters; use a PNG that emag-export wrote and nothing stripped"
        )
    remedy = "use a PNG that this version wrote and nothing edited"
    return read_record(PictureRecord, text, name=f"the record in {path}", remedy=remedy)
