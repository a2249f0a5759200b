"""Progress of long work, as one kind of event that everything here reports and anybody may ignore."""

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Event", "Progress", "silent"]


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something was begun, or got further.

    Examples:
        >>> import emag_export as emag
        >>> _ = emag.build("tiny-sd3", "bundle", progress=lambda event: print(event.component, event.phase))
        source hash
        bundle reuse
    """

    component: str
    """What is worked on: a graph of a bundle, ``source``, ``bundle``, ``reference`` …"""
    phase: str
    """What is done with it: ``load``, ``trace``, ``verify``, ``hash``, ``step`` … ``reuse`` means that it is
    there."""
    done: int = 0
    """Units of work finished in this phase."""
    total: int | None = None
    """Units in all; None where that is not known."""
    bytes: int | None = None
    """What was written, with phase ``written``."""


Progress = Callable[[Event], None]
"""Told of every event, in the thread that works."""


def silent(event: Event) -> None:
    """For callers who do not want to know."""
