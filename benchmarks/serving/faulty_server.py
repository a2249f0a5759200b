"""``emag-export serve`` with an engine that fails now and then: ``benchmarks.serving.faulty_server``.

Arguments are those of ``emag-export serve``; the variable ``FAULTS`` is the share of calls that fail.
"""

import os
import random
import sys
from collections.abc import Mapping
from itertools import count
from typing import Any

from torch import Tensor

from emag_export.bundle import DENOISER, Bundle
from emag_export.cli.main import main
from emag_export.engines.observed import ObservedEngine
from emag_export.engines.protocol import Engine
from emag_export.engines.registry import open_backend
from emag_export.serve import models

__all__ = ["faulty_backend"]

_STARTING = 300
"""Calls that succeed: a server that cannot even time its calls does not start."""


def faulty_backend(share: float, draw: random.Random) -> Any:
    """``open_backend`` whose denoisers fail in some calls.

    Args:
        share: Of the calls.
        draw: Decides which.
    """

    def opener_of(config: Any, bundle: Bundle) -> Any:
        open_engine, calls = open_backend(config, bundle), count()

        def fail(feeds: Mapping[str, Tensor]) -> None:
            if next(calls) > _STARTING and draw.random() < share:
                raise RuntimeError("injected: an illegal memory access was encountered")

        def opened(home: Bundle, component: str) -> Engine:
            engine = open_engine(home, component)
            return ObservedEngine(engine, before=fail) if component == DENOISER else engine

        return opened

    return opener_of


if __name__ == "__main__":
    found = faulty_backend(float(os.environ["FAULTS"]), random.Random(0))
    setattr(models, "open_backend", found)  # noqa: B010  it is no export of that module
    main(args=["serve", *sys.argv[1:]], prog_name="emag-export")
