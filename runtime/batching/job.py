"""One image that wants to be denoised, and what is said about it on the way."""

from collections.abc import Callable
from dataclasses import dataclass, field

from emag_export.errors import CancelledError, DeadlineError, EmagError, InputError
from emag_export.runtime.guidance.rules import Rows
from emag_export.runtime.prepare import Prepared

__all__ = [
    "Admitted",
    "Failed",
    "Finished",
    "Job",
    "JobEvent",
    "Listener",
    "Stepped",
    "Urgency",
    "reason_to_end",
]


@dataclass(frozen=True, kw_only=True)
class Admitted:
    """The image has a place; its first step comes with the next call of its bank."""


@dataclass(frozen=True, kw_only=True)
class Stepped:
    """One more step is done."""

    index: int
    """From 0."""
    steps: int
    """In all."""
    clean: Rows | None
    """x0 that this step predicts, one image, where the job wanted to see it."""


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The last step is done."""

    latents: Rows
    """Of one image, the caller's own."""


@dataclass(frozen=True, kw_only=True)
class Failed:
    """There will be no image."""

    error: EmagError


JobEvent = Admitted | Stepped | Finished | Failed
Listener = Callable[[JobEvent], None]
"""Called between two steps, in the thread of the scheduler: it must be quick and must not raise."""


@dataclass(frozen=True, kw_only=True)
class Urgency:
    """What decides who comes first; see :mod:`emag_export.runtime.batching.policy`."""

    arrived: float
    """Seconds of the scheduler's clock."""
    number: int = 0
    """Tells those apart that arrived together."""
    priority: int = 0
    """Larger comes first, where the policy looks at it."""
    deadline: float | None = None
    """Seconds of the scheduler's clock; whoever is not done by then is given up."""


def reason_to_end(cancelled: bool, urgency: Urgency, now: float) -> EmagError | None:
    """Why an image is to be given up, if it is.

    Args:
        cancelled: Whether its caller asked for that.
        urgency: With its deadline.
        now: Seconds of the clock that the deadline is on.
    """
    if cancelled:
        return CancelledError("the picture was given up, as was asked for")
    if urgency.deadline is not None and now >= urgency.deadline:
        return DeadlineError("the picture was not finished by its deadline; allow more time, or try later")
    return None


@dataclass(kw_only=True, eq=False)
class Job:
    """One image on its way through a scheduler."""

    prepared: Prepared
    """Of one request."""
    listener: Listener
    urgency: Urgency
    shown: frozenset[int] = frozenset()
    """Steps after which the clean latents are handed to the listener."""
    index: int = field(default=0, init=False)
    """Of the next step."""
    cancelled: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if len(self.prepared.requests) != 1:
            raise InputError(
                f"a job is one image, {len(self.prepared.requests)} requests were prepared together; "
                "prepare each by itself"
            )

    @property
    def steps(self) -> int:
        """In all."""
        return len(self.prepared.plan.steps)

    def reason_to_end(self, now: float) -> EmagError | None:
        """Why it is to be given up at a time, if it is."""
        return reason_to_end(self.cancelled, self.urgency, now)

    def cancel(self) -> None:
        """Give the image up before its next step; from any thread."""
        self.cancelled = True
