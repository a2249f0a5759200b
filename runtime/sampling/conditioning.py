"""What the prompts became: named tensors, one row per image, and the trunk rows they make."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from emag_export.errors import ContractError, InputError
from emag_export.runtime.sampling.rows import PlacedRows, pick

__all__ = ["Conditioning", "Trunk"]

Trunk = Mapping[str, Tensor]
"""Conditioning of the trunk rows ``[u…, c…]``, by name in ``contract.conditioning``."""


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """Conditioning of some images."""

    given: Mapping[str, Tensor]
    """With the prompt, by name in ``contract.conditioning``; images first."""
    negative: Mapping[str, Tensor] | None = None
    """Without it; None where no image has an unconditional prediction."""

    def __post_init__(self) -> None:
        if self.negative is not None and self.negative.keys() != self.given.keys():
            raise InputError(
                f"the negative conditioning has {', '.join(self.negative) or 'nothing'}, the other one "
                f"{', '.join(self.given)}; give the same tensors in both"
            )

    def to(self, device: torch.device) -> Self:
        """The same on another device.

        Args:
            device: Where it is needed.
        """
        return self._each(lambda tensor: tensor.to(device))

    def select(self, images: Sequence[int]) -> Self:
        """That of some images, in this order.

        Args:
            images: Their places, from 0.
        """
        return self._each(lambda tensor: pick(tensor, images))

    @classmethod
    def cat(cls, parts: Sequence["Conditioning"]) -> Self:
        """That of several groups of images behind each other.

        Where only some have a negative prompt, the others' own prompt stands in its place: their rows are not
        sent.

        Args:
            parts: At least one.

        Raises:
            ContractError: If the sizes of a tensor differ; group images by them.
        """
        names = parts[0].given.keys()
        for name in names:
            shapes = {tuple(part.given[name].shape[1:]) for part in parts}
            if len(shapes) > 1:
                raise ContractError(
                    f"{name} has the sizes {sorted(shapes)}; one call takes images of one size"
                )
        given = {name: torch.cat([part.given[name] for part in parts]) for name in names}
        if all(part.negative is None for part in parts):
            return cls(given=given)
        negatives = [part.given if part.negative is None else part.negative for part in parts]
        return cls(given=given, negative={name: torch.cat([n[name] for n in negatives]) for name in names})

    def trunk(self, rows: PlacedRows) -> Trunk:
        """What the trunk rows of a call take.

        Args:
            rows: Of the call; they say which images have an unconditional row.

        Raises:
            InputError: If unconditional rows are needed and there is no negative prompt.
        """
        if rows.uncond_images is None:
            return self.given
        if self.negative is None:
            raise InputError("this guidance needs an unconditional prediction: give a negative conditioning")
        return {
            name: torch.cat([_rows(self.negative[name], rows.uncond_images), tensor])
            for name, tensor in self.given.items()
        }

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        negative = self.negative
        return type(self)(
            given={name: change(tensor) for name, tensor in self.given.items()},
            negative=None if negative is None else {name: change(t) for name, t in negative.items()},
        )


def _rows(tensor: Tensor, images: slice | Tensor) -> Tensor:
    return tensor[images] if isinstance(images, slice) else tensor.index_select(0, images)
