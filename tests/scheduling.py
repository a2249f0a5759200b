"""Requests for tests of the step scheduler, and the latents that each has alone."""

import random
from functools import cache
from typing import Any

from torch import Tensor

from emag_export.kinds import Variant
from emag_export.runtime.prepare import Prepared
from tests.mixtures import PreciseEngine, alone, noisy, prepared_request, some_request

GRIDS = ((3, 4), (2, 3))


@cache
def precise(variant: Variant) -> PreciseEngine:
    return PreciseEngine(variant)


@cache
def request_of(variant: Variant, number: int) -> Any:
    """One of a few dozen requests of two sizes, every third with a sampler that adds noise."""
    grid = GRIDS[number % 2]
    request = some_request(precise(variant), random.Random(number), grid=grid)
    return noisy(request) if number % 3 == 0 else request


def prepared(variant: Variant, number: int) -> Prepared:
    return prepared_request(request_of(variant, number), seed=number)


@cache
def expected(variant: Variant, number: int) -> Tensor:
    return alone(precise(variant), prepared(variant, number))
