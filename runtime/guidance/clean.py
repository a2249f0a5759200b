"""From a prediction to the clean latents it stands for, and back: x0 = p x + q prediction."""

from dataclasses import dataclass
from typing import Self

from jaxtyping import Float
from torch import Tensor

__all__ = ["Clean", "Number"]

Number = float | Float[Tensor, "images ..."]
"""One number for all images, or one per image with as many axes as the latents."""

_SMALLEST = 1e-5


@dataclass(frozen=True, kw_only=True)
class Clean:
    """Coefficients of one step; for a velocity p = 1 and q = -sigma.

    Examples:
        >>> import torch
        >>> from emag_export.runtime.guidance.clean import Clean
        >>> clean = Clean.of(1.0, -0.5)  # sigma 0.5
        >>> noisy, velocity = torch.full((1, 4, 8, 8), 3.0), torch.full((1, 4, 8, 8), 2.0)
        >>> clean.latents(noisy, velocity).unique()
        tensor([2.])
    """

    p: Number
    q: Number
    divisor: Number
    """q, kept away from 0 where it is divided by."""

    @classmethod
    def of(cls, p: float, q: float) -> Self:
        """The same for all images.

        Args:
            p: Of the noisy latents.
            q: Of the prediction.
        """
        return cls(p=p, q=q, divisor=cls.divisor_of(q))

    @staticmethod
    def divisor_of(q: float) -> float:
        """Q with its sign, at least 1e-5 away from 0.

        Args:
            q: Of the prediction.
        """
        return max(abs(q), _SMALLEST) * (1 if q >= 0 else -1)

    def latents(self, noisy: Tensor, prediction: Tensor) -> Tensor:
        """x0 of a prediction.

        Args:
            noisy: x, latent units.
            prediction: A velocity or epsilon.
        """
        return self.p * noisy + self.q * prediction

    def prediction(self, noisy: Tensor, latents: Tensor) -> Tensor:
        """The prediction whose x0 these latents are.

        Args:
            noisy: x, latent units.
            latents: x0, latent units.
        """
        return (latents - self.p * noisy) / self.divisor
