"""What becomes of c - p, along which guidance steers away from its hard negative.

It is a few percent of c, so an engine whose c is good may have little left of it. Rounding a weight shifts
c and p alike and cancels; rounding an activation does not.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

__all__ = ["DirectionError", "direction_error", "mean_of"]


@dataclass(frozen=True, kw_only=True)
class DirectionError:
    """C and c - p of an engine against the reference's, means over images."""

    cond: float
    """Norm of the error of c, as a fraction of that of c."""
    error: float
    """Norm of the error of c - p, as a fraction of that of c - p."""
    projection: float
    """The engine's c - p along the reference's, in multiples of it: 1 steers as far."""
    cosine: float
    """Between the two."""

    def __str__(self) -> str:
        return f"error {self.error:.3g}, projection {self.projection:.3f}, cosine {self.cosine:.3f}"


def direction_error(reference: tuple[Tensor, Tensor], engine: tuple[Tensor, Tensor]) -> DirectionError:
    """Compare one guided step.

    Args:
        reference: c and p, [images, channels, *sides].
        engine: Likewise; they may lie on another device.
    """
    wanted_cond, wanted = _pair(reference, reference[0].device)
    got_cond, got = _pair(engine, reference[0].device)
    along = (got * wanted).sum(dim=1)
    wanted_norm, got_norm = wanted.norm(dim=1), got.norm(dim=1)
    return DirectionError(
        cond=float(((got_cond - wanted_cond).norm(dim=1) / wanted_cond.norm(dim=1)).mean()),
        error=float(((got - wanted).norm(dim=1) / wanted_norm).mean()),
        projection=float((along / wanted_norm**2).mean()),
        cosine=float((along / (wanted_norm * got_norm)).mean()),
    )


def _pair(predictions: tuple[Tensor, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """C, and c - p, of every image as one vector, in float64: they are small differences."""
    cond, perturbed = (tensor.to(device).double().flatten(1) for tensor in predictions)
    return cond, cond - perturbed


def mean_of(steps: Iterable[DirectionError]) -> DirectionError:
    """Means over steps, of which there is at least one."""
    found = list(steps)
    fields = DirectionError.__dataclass_fields__
    return DirectionError(**{name: fmean(getattr(step, name) for step in found) for name in fields})
