"""A pipeline whose pictures share engine calls: text, steps and decoding in threads beside each other.

A ticket goes from the queue to the text encoders, from there to the step scheduler, and to the decoder. At
most as many images are encoded ahead as may be live, so that the queue decides who is next.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from threading import Condition, Thread
from types import TracebackType
from typing import Self

from emag_export.errors import ContractError, EmagError, EngineError, QueueFullError, UnavailableError
from emag_export.runtime.batching.backlog import Backlog
from emag_export.runtime.batching.job import Admitted, Failed, Finished, Job, JobEvent, Stepped, Urgency
from emag_export.runtime.batching.lane import Lane
from emag_export.runtime.batching.options import BatchingOptions, Sizing, size_room
from emag_export.runtime.batching.policy import policy_of
from emag_export.runtime.batching.scheduler import Call, Observe, StepScheduler
from emag_export.runtime.batching.ticket import Progressed, Status, Ticket, TicketEvent
from emag_export.runtime.pictures.metadata import make_picture
from emag_export.runtime.pictures.preview import preview_factors
from emag_export.runtime.pipeline import Pipeline
from emag_export.runtime.request import GenerationRequest, check_prompts, plan_request
from emag_export.runtime.stream import preview_images

__all__ = ["BatchedPipeline"]

_TICK = 0.25
"""Seconds after which waiting threads look at deadlines."""
_LONGEST_PAUSE = 30.0
"""Seconds between two attempts to open an engine again, at most."""


class BatchedPipeline:
    """Draws many pictures at once. Every method may be called from any thread.

    Args:
        pipeline: Opened for this alone; it is closed with this.
        options: How many images, in which order.
        sizing: What was measured, of :func:`size_room`; None measures now.
        observe: Told of every engine call.
        clock: Seconds.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        options: BatchingOptions | None = None,
        *,
        sizing: Sizing | None = None,
        observe: Observe = lambda call: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.options = options or BatchingOptions()
        self.pipeline, self.bundle = pipeline, pipeline.bundle
        self.sizing = sizing or size_room(pipeline, self.options)
        self._clock, self._watch = clock, observe
        self._policy = policy_of(self.options.policy)
        self._backlog = Backlog(self.sizing.seconds_per_step)
        self._scheduler = StepScheduler(
            self.bundle.contract,
            pipeline.denoiser,
            room=self.sizing.room,
            policy=self._policy,
            observe=self._observe,
            clock=clock,
        )
        self._change = Condition()
        self._queue: list[Ticket] = []
        self._open: set[Ticket] = set()
        self._encoding: Ticket | None = None
        self._accepting, self._ended = True, False
        self._failure: EmagError | None = None
        self.reopened = 0
        """How often the engine was opened again after it had failed."""
        self._progressed = clock()
        self._number = 0
        self._decoder = Lane("emag-decode")
        self._threads = [
            Thread(target=self._encode_all, name="emag-encode", daemon=True),
            Thread(target=self._step_all, name="emag-steps", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        """Images that are not being denoised yet."""
        with self._change:
            return self._waiting()

    @property
    def live(self) -> int:
        """Images that are being denoised."""
        return self._scheduler.live

    @property
    def unfinished(self) -> int:
        """Images that nothing has been answered for."""
        return len(self._open)

    @property
    def not_ready(self) -> str | None:
        """Why no picture can be asked for now; None if it can."""
        if not self._accepting:
            return "draining: it ends soon"
        if self._failure is not None:
            return "the engine has failed and is being opened again"
        still = self._clock() - self._progressed
        if self._open and still > self.options.stall_seconds:
            return f"no step was finished for {still:.0f} seconds"
        return None

    def retry_after(self, images: int = 1) -> int:
        """Seconds until there is likely room for so many images more."""
        with self._change:
            queued = sum(ticket.request.steps for ticket in self._queue)
            here = len(self._open)
        return self._backlog.retry_after(queued + self._scheduler.remaining_steps(), here, images)

    def submit(
        self,
        requests: Sequence[GenerationRequest],
        *,
        listener: Callable[[Ticket, TicketEvent], None] = lambda ticket, event: None,
        shown: frozenset[int] = frozenset(),
        priority: int = 0,
        seconds: float | None = None,
    ) -> list[Ticket]:
        """Ask for pictures; all of them are taken, or none.

        Args:
            requests: One per picture; they may differ in everything.
            listener: Told of every step and of the end, from threads of this pipeline: quick, never raising.
            shown: Steps after which a preview is made.
            priority: Larger comes first, where the policy looks at it.
            seconds: After which what is not finished is given up; None waits for ever.

        Raises:
            InputError: If a request does not fit the bundle.
            BundleError: If previews are asked for and the bundle has none.
            QueueFullError: If too many wait; it says when there will be room.
            UnavailableError: If this is about to end, or its engine is being opened again.
        """
        for request in requests:
            check_prompts(self.bundle, request)
            plan_request(self.bundle, request)
        if shown:
            preview_factors(self.bundle)
        with self._change:
            if (reason := self.not_ready) is not None:
                raise UnavailableError(f"this model takes no requests now ({reason}); try again")
            if self._waiting() + len(requests) > self.options.queue_images + self._idle():
                raise QueueFullError(
                    f"{self._waiting()} pictures wait and {len(requests)} more were asked for, "
                    f"{self.options.queue_images} may wait; try again later",
                    retry_after=self.retry_after(len(requests)),
                )
            now = self._clock()
            tickets = [self._ticket(request, now, priority, seconds) for request in requests]
            for ticket in tickets:
                ticket.shown, ticket.listener = shown, listener
            self._queue += tickets
            self._queue.sort(key=lambda ticket: self._policy(ticket.urgency))
            self._open.update(tickets)
            self._change.notify_all()
        return tickets

    def drain(self, seconds: float | None = None) -> bool:
        """Take nothing new, and wait for what is there.

        Args:
            seconds: At most; None waits until everything is finished.

        Returns:
            Whether everything was finished.
        """
        with self._change:
            self._accepting = False
            return self._change.wait_for(lambda: not self._open, seconds)

    def close(self) -> None:
        """Give up what is unfinished and free the engines."""
        with self._change:
            self._accepting, self._ended = False, True
            waiting, self._queue = self._queue, []
            self._change.notify_all()
        for ticket in waiting:
            self._settle(ticket, UnavailableError("the server ends; try again later"))
        for thread in self._threads:
            thread.join()
        self._scheduler.fail_all(UnavailableError("the server ends; try again later"))
        self._decoder.close()
        self.pipeline.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _waiting(self) -> int:
        return len(self._queue) + self._scheduler.waiting + (self._encoding is not None)

    def _idle(self) -> int:
        """Places for images that would not have to wait."""
        return max(0, self.sizing.room.live - self._scheduler.live)

    def _ticket(self, request: GenerationRequest, now: float, priority: int, seconds: float | None) -> Ticket:
        self._number += 1
        deadline = None if seconds is None else now + seconds
        urgency = Urgency(arrived=now, number=self._number, priority=priority, deadline=deadline)
        return Ticket(request=request, urgency=urgency, times={"arrived": now})

    # The thread of the text encoders.

    def _encode_all(self) -> None:
        while (ticket := self._next_ticket()) is not None:
            try:
                ticket.times["encoding"] = self._clock()
                prepared = self.pipeline.prepare([ticket.request])
                ticket.times["encoded"] = self._clock()
                ticket.cut = prepared.cut[0]
                job = Job(
                    prepared=prepared,
                    listener=lambda event, ticket=ticket: self._job_event(ticket, event),  # type: ignore[misc]
                    urgency=ticket.urgency,
                    shown=ticket.shown,
                )
                ticket.attach(job)
                self._scheduler.submit(job)
            except EmagError as error:
                self._settle(ticket, error)
            except Exception as error:
                self._settle(ticket, EngineError(f"encoding the prompt failed: {error}"))
            with self._change:
                self._encoding = None
                self._change.notify_all()

    def _next_ticket(self) -> Ticket | None:
        """The most urgent one, once it is wanted; None at the end."""
        while True:
            with self._change:
                leaving = [(t, e) for t in self._queue if (e := t.reason_to_end(self._clock())) is not None]
                self._queue = [ticket for ticket in self._queue if ticket not in dict(leaving)]
                ahead = max(self._scheduler.waiting, self._decoder.backlog)
                if self._ended:
                    return None
                if not leaving and self._queue and ahead < self.sizing.room.live:
                    self._encoding = self._queue.pop(0)
                    return self._encoding
                if not leaving:
                    self._change.wait(_TICK)
            for ticket, error in leaving:
                self._settle(ticket, error)

    # The thread of the steps.

    def _step_all(self) -> None:
        while not self._ended:
            try:
                worked = self._scheduler.tick()
            except ContractError:  # its images have failed; the engine has not
                worked = True
            except EmagError:
                self._reopen()
                worked = True
            self._progressed = self._clock()
            if not worked:
                with self._change:
                    self._change.wait_for(lambda: self._ended or self._scheduler.waiting > 0, _TICK)

    def _reopen(self) -> None:
        pause = 1.0
        while not self._ended:
            try:
                self.pipeline.reopen_denoiser()
            except EmagError as error:
                self._failure = error
                with self._change:
                    self._change.wait_for(lambda: self._ended, pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
                continue
            self._scheduler.engine = self.pipeline.denoiser
            self._failure = None
            self.reopened += 1
            return

    def _observe(self, call: Call) -> None:
        if call.error is None:
            self._backlog.called(call.images, call.seconds)
        with suppress(Exception):  # whoever watches must not stop the loop
            self._watch(call)

    def _job_event(self, ticket: Ticket, event: JobEvent) -> None:
        if isinstance(event, Admitted):
            ticket.status = Status.RUNNING
            ticket.times["admitted"] = self._clock()
            with self._change:
                self._change.notify_all()
        elif isinstance(event, Stepped):
            ticket.index = event.index + 1
            if event.clean is None:
                ticket.tell(Progressed(index=event.index, steps=event.steps, preview=None))
            else:
                self._decoder.put(lambda: self._show(ticket, event))
        elif isinstance(event, Finished):
            self._decoder.put(lambda: self._draw(ticket, event))
        elif isinstance(event, Failed):
            self._settle(ticket, event.error)

    # The thread of the decoder.

    def _show(self, ticket: Ticket, event: Stepped) -> None:
        if event.clean is None or ticket.cancelled:
            return
        request = ticket.request
        (picture,) = preview_images(
            event.clean, preview_factors(self.bundle), height=request.height, width=request.width
        )
        ticket.times.setdefault("previewed", self._clock())
        ticket.tell(Progressed(index=event.index, steps=event.steps, preview=picture))

    def _draw(self, ticket: Ticket, event: Finished) -> None:
        if ticket.cancelled:
            self._settle(ticket, ticket.reason_to_end(self._clock()))
            return
        started = self._clock()
        try:
            (pixels,) = self.pipeline.decode(event.latents)
            picture = make_picture(pixels, self.bundle, ticket.request, self.pipeline.denoiser.name)
        except EmagError as error:
            self._settle(ticket, error)
        except Exception as error:
            self._settle(ticket, EngineError(f"decoding failed: {error}"))
        else:
            ticket.times["decoding"] = started
            self._settle(ticket, picture)

    def _settle(self, ticket: Ticket, outcome: object) -> None:
        ticket.settle(outcome, self._clock())
        with self._change:
            self._open.discard(ticket)
            self._change.notify_all()
