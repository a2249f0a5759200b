"""Requests as they arrive: open loop, Poisson, of mixed length, the same for every contender."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from emag_export.tiny_sd3.captions import caption
from emag_export.tiny_sd3.scenes import sample_scene

__all__ = ["STEPS", "Arrival", "Served", "percentile", "poisson"]

STEPS = (4, 12, 28)
"""Lengths of runs, equally many of each."""


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """One picture that somebody asks for."""

    at: float
    """Seconds after the beginning."""
    seed: int
    steps: int
    guidance: str
    prompt: str


@dataclass(frozen=True, kw_only=True)
class Served:
    """What became of it."""

    arrival: Arrival
    seconds: float
    """From when it should have been sent to its last byte: a sender that is late hides nothing."""
    first_preview: float | None = None
    """Likewise, to the first preview."""

    @property
    def ended(self) -> float:
        """Seconds after the beginning."""
        return self.arrival.at + self.seconds


def poisson(count: int, rate: float, guidances: Sequence[str], *, seed: int = 0) -> list[Arrival]:
    """Requests with exponential gaps.

    Args:
        count: A multiple of ``len(STEPS)``, so that lengths are equally many.
        rate: Requests a second; infinity lets all arrive at once.
        guidances: Taken in turn.
        seed: Of gaps, order and scenes.
    """
    draw, scenes = random.Random(seed), np.random.default_rng(seed)
    steps = [STEPS[index % len(STEPS)] for index in range(count)]
    draw.shuffle(steps)
    at, arrivals = 0.0, []
    for index in range(count):
        at += 0.0 if rate == float("inf") else draw.expovariate(rate)
        arrivals.append(
            Arrival(
                at=at,
                seed=index,
                steps=steps[index],
                guidance=guidances[index % len(guidances)],
                prompt=caption(sample_scene(scenes)),
            )
        )
    return arrivals


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which a share of all lies, between neighbours along a straight line."""
    return float(np.quantile(np.asarray(values), share))
