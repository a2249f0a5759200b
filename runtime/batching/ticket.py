"""A picture that was asked for: where it stands, and how to wait for it or give it up."""

from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from enum import StrEnum

from PIL import Image

from emag_export.errors import CancelledError, EmagError, EngineError
from emag_export.families.texts import Cut
from emag_export.runtime.batching.job import Job, Urgency, reason_to_end
from emag_export.runtime.pictures.metadata import Picture
from emag_export.runtime.request import GenerationRequest

__all__ = ["Drawn", "Ended", "Progressed", "Status", "Ticket", "TicketEvent"]


class Status(StrEnum):
    """Where a picture stands."""

    QUEUED = "queued"
    """Waiting for its text to be encoded, or for a place."""
    RUNNING = "running"
    """Being denoised or decoded."""
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, kw_only=True)
class Progressed:
    """One more step is done."""

    index: int
    """From 0."""
    steps: int
    """In all."""
    preview: Image.Image | None
    """What the finished picture is likely to be, where it was asked for."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """The picture is finished."""

    picture: Picture


@dataclass(frozen=True, kw_only=True)
class Ended:
    """There will be no picture."""

    error: EmagError


TicketEvent = Progressed | Drawn | Ended


@dataclass(kw_only=True, eq=False)
class Ticket:
    """One picture on its way. Made by ``BatchedPipeline.submit``."""

    request: GenerationRequest
    urgency: Urgency
    shown: frozenset[int] = frozenset()
    """Steps after which a preview is made."""
    listener: Callable[["Ticket", TicketEvent], None] = lambda ticket, event: None
    """Called from threads of the pipeline; must be quick and must not raise."""
    status: Status = Status.QUEUED
    index: int = 0
    """Steps that are done."""
    cut: Cut | None = None
    """What of the prompt was beyond the text encoders' limits, once it is encoded."""
    times: dict[str, float] = field(default_factory=dict)
    """Seconds of the pipeline's clock: ``arrived``, ``encoding``, ``encoded``, ``admitted``, ``previewed``,
    ``decoding``, ``ended``; those that were reached."""
    _job: Job | None = None
    _cancelled: bool = False
    _future: "Future[Picture]" = field(default_factory=Future)

    def cancel(self) -> None:
        """Give the picture up before its next step; harmless when it is finished."""
        self._cancelled = True
        if self._job is not None:
            self._job.cancel()

    @property
    def cancelled(self) -> bool:
        """Whether somebody gave it up."""
        return self._cancelled

    def reason_to_end(self, now: float) -> EmagError | None:
        """Why it is to be given up at a time, if it is."""
        return reason_to_end(self._cancelled, self.urgency, now)

    @property
    def done(self) -> bool:
        """Whether nothing more will happen."""
        return self._future.done()

    def result(self, timeout: float | None = None) -> Picture:
        """Wait for the picture.

        Args:
            timeout: Seconds; None waits for ever.

        Raises:
            TimeoutError: If it is not finished by then.
            CancelledError: If it was given up.
            DeadlineError: If its own deadline passed.
            EngineError: If the engine failed.
            InputError: If the request does not fit the bundle.
        """
        return self._future.result(timeout)

    def wait(self, timeout: float | None = None) -> None:
        """Until it is done, however it ends; arguments as :meth:`result`."""
        wait([self._future], timeout)

    def attach(self, job: Job) -> None:
        """Tie it to the job that denoises it."""
        self._job = job
        if self._cancelled:
            job.cancel()

    def tell(self, event: TicketEvent) -> None:
        """Pass an event on; a listener that raises gives its own picture up and harms nobody else."""
        try:
            self.listener(self, event)
        except Exception:
            self.cancel()

    def settle(self, outcome: object, now: float) -> None:
        """End with a picture or an error; a second end changes nothing.

        Args:
            outcome: A ``Picture``, or the error that keeps it from being one.
            now: Seconds of the pipeline's clock.
        """
        if self._future.done():
            return
        self.times["ended"] = now
        self._job = None  # with its conditioning, which is larger than the picture
        if isinstance(outcome, Picture):
            self.status = Status.COMPLETED
            self._future.set_result(outcome)
            self.tell(Drawn(picture=outcome))
            return
        error = outcome if isinstance(outcome, EmagError) else EngineError(f"the picture failed: {outcome}")
        self.status = Status.CANCELLED if isinstance(error, CancelledError) else Status.FAILED
        self._future.set_exception(error)
        self.tell(Ended(error=error))
