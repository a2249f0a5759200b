"""Who comes first of those that wait."""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

from emag_export.errors import InputError
from emag_export.runtime.batching.job import Urgency

__all__ = ["POLICIES", "Policy", "by_priority", "earliest_deadline", "oldest_first", "policy_of"]

Policy = Callable[[Urgency], tuple[float, ...]]
"""Urgency to a key: the smallest comes first."""

AGING_SECONDS = 10.0
"""A waiting image gains one step of priority in this time, so that none waits for ever."""


def oldest_first(urgency: Urgency) -> tuple[float, ...]:
    """In the order of arrival."""
    return (urgency.arrived, urgency.number)


def by_priority(urgency: Urgency) -> tuple[float, ...]:
    """The highest priority first, but whoever waits rises.

    Everybody ages alike, so the order of two images never changes: a priority is worth a head start of
    :data:`AGING_SECONDS` per step.
    """
    return (urgency.arrived - AGING_SECONDS * urgency.priority, urgency.number)


def earliest_deadline(urgency: Urgency) -> tuple[float, ...]:
    """The nearest deadline first; without one, last."""
    deadline = math.inf if urgency.deadline is None else urgency.deadline
    return (deadline, urgency.arrived, urgency.number)


POLICIES: Mapping[str, Policy] = MappingProxyType(
    {"fifo": oldest_first, "priority": by_priority, "deadline": earliest_deadline}
)


def policy_of(name: str) -> Policy:
    """A policy by name.

    Raises:
        InputError: If there is no such policy.
    """
    if name not in POLICIES:
        raise InputError(f"there is no `policy` {name!r}; choose {', '.join(POLICIES)}")
    return POLICIES[name]
