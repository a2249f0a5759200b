"""The pixels of a picture on disk."""

from pathlib import Path

import numpy as np
from PIL import Image

from emag_export.errors import InputError
from emag_export.evaluation.metrics.protocol import Pixels

__all__ = ["read_pixels"]


def read_pixels(path: Path) -> Pixels:
    """The pixels of a picture.

    Raises:
        InputError: If it cannot be read.
    """
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except OSError as error:
        raise InputError(
            f"{path} cannot be read as a picture ({error}); delete it to draw it again"
        ) from error
