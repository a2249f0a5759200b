"""What a metric is: named columns, and numbers for a picture or for all pictures of a prompt."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, UInt8

__all__ = ["Better", "Column", "Features", "Metric", "Pixels", "Scores", "SeedMetric", "SetMetric"]

Features = Float[np.ndarray, "_ _"]
Better = Literal["higher", "lower", "neither"]
Pixels = UInt8[np.ndarray, "height width 3"]
Scores = Mapping[str, float | None]
"""Column to number; None where it cannot be measured, such as the place of an object that is not there."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """One number of a metric."""

    name: str
    better: Better
    """Which direction is an improvement."""
    unit: str = ""
    """Empty for shares and other numbers without one."""
    tested: bool = True
    """Compared with the baseline. Parts of another column are not: every test weakens all others."""
    summary: str


@runtime_checkable
class Metric(Protocol):
    """Scores every picture by itself."""

    @property
    def name(self) -> str:
        """By which it is asked for."""
        ...

    def key(self) -> str:
        """Changes whenever the same picture would get other scores; scores are kept under it."""
        ...

    @property
    def columns(self) -> tuple[Column, ...]:
        """What it gives."""
        ...

    def score(self, prompt: str, pixels: Pixels) -> Scores:
        """Numbers of one picture, one per column."""
        ...


@runtime_checkable
class SeedMetric(Protocol):
    """Scores the pictures of one prompt together: the same prompt, guidance and scales, other seeds."""

    @property
    def name(self) -> str:
        """By which it is asked for."""
        ...

    @property
    def columns(self) -> tuple[Column, ...]:
        """What it gives."""
        ...

    def score(self, pictures: Sequence[Pixels]) -> Scores:
        """Numbers of a prompt, one per column."""
        ...


@runtime_checkable
class SetMetric(Protocol):
    """Scores all pictures of a setting together, against reference pictures, by features of each."""

    @property
    def name(self) -> str:
        """By which it is asked for."""
        ...

    def key(self) -> str:
        """Changes whenever the same picture would get other features; they are kept under it."""
        ...

    @property
    def columns(self) -> tuple[Column, ...]:
        """What it gives."""
        ...

    def features(self, pixels: Pixels) -> Float[np.ndarray, " features"]:
        """Features of one picture."""
        ...

    @property
    def kept(self) -> bool:
        """Features take long, so they are kept on disk."""
        ...

    def references(self) -> Iterator[Pixels]:
        """What it holds pictures against."""
        ...

    def score(self, pictures: Features, references: Features) -> Scores:
        """Numbers of a setting, one per column."""
        ...
