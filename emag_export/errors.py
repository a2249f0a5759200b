"""Every exception this package raises on purpose, in one tree.

The command line maps each class to an exit code (:attr:`EmagError.exit_code`), so a script can tell a
typing mistake from a corrupted bundle without reading the text. A message says what was got, what was
wanted and what to do.
"""

__all__ = [
    "BundleError",
    "ComparisonFailed",
    "ContractError",
    "EmagError",
    "EngineError",
    "ExportError",
    "InputError",
    "MissingDependencyError",
    "ModelError",
]


class EmagError(Exception):
    """Base of every error raised on purpose; catch it to catch them all."""

    exit_code: int = 1


class ComparisonFailed(EmagError):  # noqa: N818  an outcome, not a defect
    """A comparison ran to its end and a figure lies above its threshold."""

    exit_code = 1


class InputError(EmagError):
    """An option, prompt, number or file given by the caller cannot be used."""

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
