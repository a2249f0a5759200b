"""Pictures on disk: PNG files that remember every parameter, so that any of them can be made again."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from emag_export import __version__
from emag_export.bundle import Bundle
from emag_export.contract import Variant
from emag_export.errors import InputError
from emag_export.records import FORMAT_VERSION, dump_record, read_record
from emag_export.runtime.request import GenerationRequest

__all__ = ["PictureRecord", "read_picture_record", "save_picture"]

_KEY = "emag-export"


@dataclass(frozen=True, kw_only=True)
class PictureRecord:
    """What a PNG says about how it was made."""

    format_version: int = FORMAT_VERSION
    version: str = __version__
    """Of emag-export."""
    request: GenerationRequest
    model: str
    variant: Variant
    fingerprint: str
    """Of the source model."""
    precision: str
    engine: str


def save_picture(
    picture: UInt8[np.ndarray, "height width 3"],
    path: Path,
    *,
    bundle: Bundle,
    request: GenerationRequest,
    engine: str,
) -> None:
    """Write a PNG with all parameters in its text chunks.

    Args:
        picture: 8-bit sRGB.
        path: Where to; the file appears whole or not at all.
        bundle: It was made with.
        request: It was made from.
        engine: Name of the backend that made it.
    """
    record = PictureRecord(
        request=request,
        model=bundle.provenance.model,
        variant=bundle.contract.variant,
        fingerprint=bundle.provenance.fingerprint,
        precision=bundle.contract.precision,
        engine=engine,
    )
    info = PngInfo()
    info.add_itxt("Description", request.prompt)
    info.add_itxt("Software", f"emag-export {__version__}")
    info.add_itxt(_KEY, dump_record(record))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    Image.fromarray(picture).save(partial, format="PNG", pnginfo=info)
    partial.replace(path)


def read_picture_record(path: Path) -> PictureRecord:
    """What :func:`save_picture` wrote.

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
