"""A bank: the state of the images that share calls, in buffers that never move.

The averages, which are large, lie in two buffers for the most images that a bank takes. Live images are
always the first ones; the place of one that leaves is taken by the last. So a call reads and writes the same
addresses whenever it has the same number of images, which is what a captured CUDA graph needs, and nobody's
leaving copies more than one image's state.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from emag_export.contract import DenoiserContract
from emag_export.engines.protocol import TORCH_DTYPES, Engine
from emag_export.errors import ContractError
from emag_export.runtime.guidance.rules import Rows
from emag_export.runtime.sampling.call import ImageStep, place_calls
from emag_export.runtime.sampling.conditioning import Conditioning
from emag_export.runtime.sampling.rows import pick
from emag_export.runtime.sampling.state import RunState, state_shape
from emag_export.runtime.step import StepResult, step

__all__ = ["Moved", "Shape", "Slots", "shape_of"]

Shape = tuple[tuple[int, ...], ...]
"""Sizes of one image's latents and conditioning: images of one shape can share a call."""


def shape_of(latents: Tensor, conditioning: Conditioning) -> Shape:
    """What decides whether images can share a call."""
    return tuple(tuple(tensor.shape[1:]) for tensor in (latents, *conditioning.given.values()))


@dataclass(frozen=True, kw_only=True)
class Moved:
    """One image's state on its way from one bank to another."""

    latents: Rows
    average: Tensor
    delta: Tensor
    momentum: Rows
    conditioning: Conditioning


class Slots:
    """Places for some images of one shape.

    Args:
        contract: Of the graph.
        latents: Of one image, an example of their shape and device.
        conditioning: Of that image.
        most: Places.
    """

    def __init__(
        self, contract: DenoiserContract, latents: Rows, conditioning: Conditioning, most: int
    ) -> None:
        self.most = most
        self.images = 0
        self._contract, self._device = contract, latents.device
        shape = (most, *state_shape(contract, latents, conditioning.given)[1:])
        dtype = TORCH_DTYPES[contract.state_dtype]
        self._averages = [torch.zeros(shape, dtype=dtype, device=self._device) for _ in range(2)]
        self._given = _places(conditioning.given, most)
        self._negative: dict[str, Tensor] | None = None
        self._latents = latents[:0].float()
        self._delta = torch.zeros(0, len(contract.blocks), device=self._device)
        self._momentum = torch.zeros_like(self._latents)

    @property
    def free(self) -> int:
        """Places that nobody has."""
        return self.most - self.images

    def join(self, latents: Rows, conditioning: Conditioning) -> int:
        """Give a new image a place.

        Args:
            latents: Its initial noise, on the engine's device.
            conditioning: Of the same one image.

        Returns:
            Its place, until somebody leaves.

        Raises:
            ContractError: If there is no place left.
        """
        place = self._next_place()
        # The first accumulation is E + 1 (X - E): what an earlier image left would cost rounding, or be NaN.
        self._averages[0][place].zero_()
        latents = latents.float()
        self._join_small(latents, self._delta.new_zeros(1, self._delta.shape[1]), torch.zeros_like(latents))
        self.write_conditioning(place, conditioning)
        self.images += 1
        return place

    def leave(self, place: int) -> None:
        """Take an image out; the last one moves to its place."""
        last = self.images - 1
        if place != last:
            self._averages[0][place].copy_(self._averages[0][last])
            for tensors in (self._given, self._negative or {}):
                for tensor in tensors.values():
                    tensor[place].copy_(tensor[last])
        order = [last if kept == place else kept for kept in range(last)]
        self._latents, self._delta, self._momentum = (
            pick(tensor, order) for tensor in (self._latents, self._delta, self._momentum)
        )
        self.images = last

    def clear(self) -> None:
        """Take all images out."""
        self._latents, self._delta, self._momentum = (
            tensor[:0] for tensor in (self._latents, self._delta, self._momentum)
        )
        self.images = 0

    def take(self, place: int) -> Moved:
        """A copy of one image's state, for another bank; the image leaves this one."""
        row = slice(place, place + 1)
        negative = self._negative
        moved = Moved(
            latents=self._latents[row].clone(),
            average=self._averages[0][row].clone(),
            delta=self._delta[row].clone(),
            momentum=self._momentum[row].clone(),
            conditioning=Conditioning(
                given={name: tensor[row].clone() for name, tensor in self._given.items()},
                negative=None if negative is None else {n: t[row].clone() for n, t in negative.items()},
            ),
        )
        self.leave(place)
        return moved

    def put(self, moved: Moved) -> int:
        """Give an image of another bank a place here; errors as :meth:`join`."""
        place = self._next_place()
        self._averages[0][place].copy_(moved.average[0])
        self._join_small(moved.latents, moved.delta, moved.momentum)
        self.write_conditioning(place, moved.conditioning)
        self.images += 1
        return place

    def write_conditioning(self, place: int, conditioning: Conditioning) -> None:
        """Exchange an image's conditioning: that of the next steps.

        Args:
            place: Of the image.
            conditioning: Of that image alone. Without a negative one, no unconditional row may be sent.
        """
        for name, tensor in conditioning.given.items():
            self._given[name][place].copy_(tensor[0])
        if conditioning.negative is not None:
            if self._negative is None:
                self._negative = _places(conditioning.negative, self.most)
            for name, tensor in conditioning.negative.items():
                self._negative[name][place].copy_(tensor[0])

    def step(
        self, engine: Engine, images: Sequence[ImageStep], noise: Rows | None = None
    ) -> tuple[Rows, StepResult]:
        """Take every image one step further.

        Args:
            engine: Runs the forked graph.
            images: What is done for each, in the order of their places.
            noise: Standard normal, like the latents, where a sampler adds noise.

        Returns:
            The latents before the step, and what was found.

        Raises:
            EngineError: If the engine fails; nothing is changed then.
        """
        live, before = self.images, self._latents
        (call,) = place_calls([images], self._contract, self._device)
        given = {name: tensor[:live] for name, tensor in self._given.items()}
        negative = self._negative
        conditioning = Conditioning(
            given=given,
            negative=None if negative is None else {name: tensor[:live] for name, tensor in negative.items()},
        )
        run = RunState(
            latents=before,
            average=self._averages[0][:live],
            spare=self._averages[1][:live],
            delta=self._delta,
            momentum=self._momentum,
        )
        after, result = step(engine, call, run, conditioning.trunk(call.rows), noise=noise)
        self._averages.reverse()
        self._latents, self._delta, self._momentum = after.latents, after.delta, after.momentum
        return before, result

    def latents(self, place: int) -> Rows:
        """A copy of one image's latents."""
        return self._latents[place : place + 1].clone()

    def _next_place(self) -> int:
        if not self.free:
            raise ContractError(f"all {self.most} places of this bank are taken; open another one")
        return self.images

    def _join_small(self, latents: Rows, delta: Tensor, momentum: Rows) -> None:
        self._latents = torch.cat([self._latents, latents])
        self._delta = torch.cat([self._delta, delta])
        self._momentum = torch.cat([self._momentum, momentum])


def _places(example: Mapping[str, Tensor], most: int) -> dict[str, Tensor]:
    return {
        name: torch.zeros((most, *tensor.shape[1:]), dtype=tensor.dtype, device=tensor.device)
        for name, tensor in example.items()
    }
