"""Every exception this package raises on purpose, in one tree.

A message says what was got, what was wanted and what to do. Parameters stand in it in backquotes, under the
names that they have in Python (:attr:`EmagError.parameters`); a call that mends the error is
:attr:`EmagError.remedy`. The command line shows both in its own words, and maps each class to an exit code
(:attr:`EmagError.exit_code`), so a script can tell a typing mistake from a corrupted bundle without reading
the text.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

__all__ = [
    "BundleError",
    "Call",
    "CancelledError",
    "ComparisonFailed",
    "ContractError",
    "DeadlineError",
    "EmagError",
    "EngineError",
    "ExportError",
    "InputError",
    "MissingDependencyError",
    "ModelError",
    "QueueFullError",
    "UnavailableError",
]

PARAMETER = re.compile(r"`([a-z][a-z_]*)`")


@dataclass(frozen=True, kw_only=True)
class Call:
    """A call of this package, as data: ``str()`` writes it in Python."""

    verb: str
    """``build``, ``compile`` or ``generate``."""
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        words = ", ".join(f"{name}={_plain(value)!r}" for name, value in self.arguments.items())
        return f"emag_export.{self.verb}({words})"


def _plain(value: Any) -> Any:
    """Enumerations and paths as text, records as tuples of their fields."""
    if is_dataclass(value) and not isinstance(value, type):
        value = tuple(getattr(value, item.name) for item in fields(value))
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    return value if isinstance(value, (bool, int, float)) else str(value)


class EmagError(Exception):
    """Base of every error raised on purpose; catch it to catch them all.

    Args:
        message: What was got, what was wanted, what to do.
        remedy: A call that mends it; follows the message.

    Examples:
        >>> import emag_export as emag
        >>> try:
        ...     emag.Pipeline.open("nowhere")
        ... except emag.EmagError as error:
        ...     print(f"{type(error).__name__}, exit code {error.exit_code}: {error.message}")
        BundleError, exit code 4: nowhere is not a bundle: it has no bundle.json; make one
    """

    exit_code: int = 1

    def __init__(self, message: str, *, remedy: Call | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return self.message if self.remedy is None else f"{self.message}: {self.remedy}"

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters that the message is about."""
        return tuple(dict.fromkeys(PARAMETER.findall(self.message)))


class InputError(EmagError):
    """A parameter, prompt, number or file given by the caller cannot be used."""

    exit_code = 2


class ModelError(EmagError):
    """The source model is missing, gated, incomplete or of an unsupported family."""

    exit_code = 3


class BundleError(EmagError):
    """A bundle is missing, incomplete, corrupted, or of another contract version or variant."""

    exit_code = 4


class ExportError(EmagError):
    """Tracing, checking or writing a graph failed."""

    exit_code = 5


class EngineError(EmagError):
    """A backend could not load or run a graph."""

    exit_code = 6


class ContractError(EngineError):
    """A tensor fed to a graph does not fit the graph's contract."""


class MissingDependencyError(EmagError):
    """An optional package is needed and absent; the message holds the pip command."""

    exit_code = 7


class ComparisonFailed(EmagError):  # noqa: N818  an outcome, not a defect
    """A comparison ran to its end and a figure lies above its threshold."""

    exit_code = 8


class QueueFullError(EmagError):
    """More is waiting than is allowed to wait.

    Args:
        message: As everywhere.
        retry_after: Seconds after which there is likely room.
    """

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class UnavailableError(EmagError):
    """A server is not ready yet, or about to end."""


class DeadlineError(EmagError):
    """A picture was not finished by the time its caller set."""


class CancelledError(EmagError):
    """A picture was given up because its caller asked for it."""
