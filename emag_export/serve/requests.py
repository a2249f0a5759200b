"""Requests for pictures that are under way, and for a while those that have ended."""

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from emag_export.runtime.batching.ticket import Drawn, Ended, Progressed, Status, Ticket, TicketEvent
from emag_export.serve.errors import ApiError
from emag_export.serve.models import ServedModel
from emag_export.serve.schemas import RequestState

__all__ = ["Inbox", "Requests", "Running"]

_REMEMBERED = 2000
_REMEMBERED_SECONDS = 600.0


class Inbox:
    """What a pipeline's threads say about a request's pictures, for the event loop.

    Of previews only the newest of every picture is kept: a client that reads slowly misses some, and memory
    does not grow.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._something = asyncio.Event()
        self._previews: dict[int, Progressed] = {}
        self._ends: deque[tuple[int, Drawn | Ended]] = deque()

    def listener(self, index: Callable[[Ticket], int]) -> Callable[[Ticket, TicketEvent], None]:
        """What a pipeline calls, from its threads.

        Args:
            index: Ticket to the number of its picture in the request.
        """

        def listen(ticket: Ticket, event: TicketEvent) -> None:
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._put, index(ticket), event)

        return listen

    async def get(self) -> tuple[int, TicketEvent]:
        """Number of a picture and what became of it; ends come before previews."""
        while True:
            if self._ends:
                index, end = self._ends.popleft()
                self._previews.pop(index, None)
                return index, end
            if self._previews:
                index = next(iter(self._previews))
                return index, self._previews.pop(index)
            self._something.clear()
            await self._something.wait()

    def _put(self, index: int, event: TicketEvent) -> None:
        if isinstance(event, Drawn | Ended):
            self._ends.append((index, event))
        elif event.preview is not None:
            self._previews[index] = event
        else:
            return
        self._something.set()


@dataclass(kw_only=True, eq=False)
class Running:
    """One request."""

    id: str
    model: ServedModel
    tickets: list[Ticket]
    """Empty once the request has ended: what is remembered of it shall be small."""
    began: float = field(default_factory=time.time)
    ended: float | None = None
    _last: RequestState | None = None

    def cancel(self) -> None:
        """Give up all pictures that are not finished."""
        for ticket in self.tickets:
            ticket.cancel()

    def end(self) -> None:
        """Note that nothing more will happen, and let its pictures go."""
        last = self.state
        if last.status in ("queued", "running"):  # given up, which the next step will find
            last = last.model_copy(update={"status": "cancelled"})
        self._last, self.ended = last, time.time()
        self.tickets = []

    @property
    def state(self) -> RequestState:
        """As ``/v1/requests/{id}`` shows it."""
        if self._last is not None:
            return self._last
        found = [ticket.status for ticket in self.tickets]
        status = next(
            (one for one in (Status.FAILED, Status.CANCELLED, Status.RUNNING) if one in found),
            found[0] if len(set(found)) == 1 else Status.RUNNING,  # some are finished, some still wait
        )
        return RequestState(
            id=self.id,
            status=status.value,
            model=self.model.name,
            images=len(found),
            finished=found.count(Status.COMPLETED),
            step=min(ticket.index for ticket in self.tickets),
            steps=self.tickets[0].request.steps,
            created_at=int(self.began),
        )


class Requests:
    """All requests by their id, the ended ones for ten minutes."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._known: OrderedDict[str, Running] = OrderedDict()

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._known

    def add(self, running: Running) -> None:
        """Remember a request."""
        self._known[running.id] = running
        self._forget()

    def get(self, request_id: str) -> Running:
        """A request.

        Raises:
            ApiError: If it is not known, or no longer.
        """
        if request_id not in self._known:
            raise ApiError(
                404,
                "there is no such request, or it ended more than ten minutes ago",
                param="id",
                code="request_not_found",
            )
        return self._known[request_id]

    def _forget(self) -> None:
        now = self._clock()
        for one in self._known.values():
            if one.ended is None and all(ticket.done for ticket in one.tickets):
                one.end()  # its client left before its answer began, so that nobody else ends it
        ended = [one for one in self._known.values() if one.ended is not None]
        surplus = len(self._known) - _REMEMBERED
        for number, one in enumerate(ended):
            if number < surplus or now - (one.ended or now) > _REMEMBERED_SECONDS:
                del self._known[one.id]
