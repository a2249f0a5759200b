"""Banks of live images: who may join where, whose turn it is, and when two of them become one."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from emag_export.contract import DenoiserContract
from emag_export.errors import InputError
from emag_export.runtime.batching.job import Job
from emag_export.runtime.batching.slots import Shape, Slots, shape_of

__all__ = ["Bank", "Banks", "Room"]


@dataclass(frozen=True, kw_only=True)
class Room:
    """How many images may be live."""

    per_call: int
    """Images of one call."""
    live: int
    """In all; those beyond ``per_call`` take turns, bank by bank."""

    def __post_init__(self) -> None:
        if not 1 <= self.per_call <= self.live:
            raise InputError(
                f"{self.per_call} images a call and {self.live} live ones were asked for; "
                "give at least one a call, and no fewer live ones"
            )

    @property
    def banks(self) -> int:
        """At once; one more than live images of one shape need, so that another shape finds room."""
        return -(-self.live // self.per_call) + 1


@dataclass(kw_only=True, eq=False)
class Bank:
    """Images of one shape, and the jobs they belong to, place by place."""

    shape: Shape
    slots: Slots
    jobs: list[Job] = field(default_factory=list)
    turn: int = 0
    """Number of its last call; the smallest is next."""


class Banks:
    """All live images.

    Args:
        contract: Of the graph.
        room: How many images may be live.
    """

    def __init__(self, contract: DenoiserContract, room: Room) -> None:
        self.room = room
        self._contract = contract
        self._banks: list[Bank] = []
        self._spare: Bank | None = None
        self._turns = 0

    def __iter__(self) -> Iterator[Bank]:
        return iter(list(self._banks))

    @property
    def live(self) -> int:
        """Images that have a place."""
        return sum(bank.slots.images for bank in self._banks)

    def next(self) -> Bank | None:
        """The bank whose last call is longest ago; None if there is no live image."""
        return min(self._banks, key=lambda bank: bank.turn, default=None)

    def called(self, bank: Bank) -> None:
        """Note that it was a bank's turn."""
        self._turns += 1
        bank.turn = self._turns

    def admit(self, job: Job) -> bool:
        """Give a job a place, or say that there is none."""
        if self.live >= self.room.live:
            return False
        latents, conditioning = job.prepared.latents, job.prepared.conditioning
        shape = shape_of(latents, conditioning)
        # The fullest bank that has room: fewer calls for the same images.
        free = [bank for bank in self._banks if bank.shape == shape and bank.slots.free]
        bank = max(free, key=lambda bank: bank.slots.images, default=None)
        if bank is None:
            if len(self._banks) >= self.room.banks:
                return False
            bank = self._open(shape, job)
        bank.slots.join(latents, conditioning)
        bank.jobs.append(job)
        return True

    def leave(self, bank: Bank, place: int) -> None:
        """Take an image out of its bank; the last one moves to its place."""
        bank.slots.leave(place)
        last = bank.jobs.pop()
        if place < len(bank.jobs):
            bank.jobs[place] = last
        if not bank.jobs:
            self.drop(bank)

    def drop(self, bank: Bank) -> None:
        """Forget a bank with all its images; its buffers are kept for the next bank of that shape."""
        self._banks.remove(bank)
        bank.slots.clear()
        self._spare = bank

    def merge(self) -> None:
        """Move one image to where it fills a call, if two banks of a shape fit into one."""
        for giver in sorted(self._banks, key=lambda bank: bank.slots.images):
            for taker in self._banks:
                fits = giver.slots.images <= taker.slots.free
                if giver is not taker and giver.shape == taker.shape and fits:
                    taker.slots.put(giver.slots.take(giver.slots.images - 1))
                    taker.jobs.append(giver.jobs.pop())
                    if not giver.jobs:
                        self.drop(giver)
                    return

    def _open(self, shape: Shape, job: Job) -> Bank:
        spare, self._spare = self._spare, None
        if spare is not None and spare.shape == shape:
            slots = spare.slots
        else:
            prepared = job.prepared
            slots = Slots(self._contract, prepared.latents, prepared.conditioning, self.room.per_call)
        bank = Bank(shape=shape, slots=slots, turn=self._turns)
        self._banks.append(bank)
        return bank
