"""What the builder says: errors kept for our own messages, memory figures kept for the record."""

import logging
import re
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

__all__ = ["BuildLog", "log_of"]

_FIGURES = {
    "scratch": re.compile(r"^Max Scratch Memory: (\d+) bytes"),
    "activation": re.compile(r"^Total Activation Memory: (\d+) bytes"),
    "weights": re.compile(r"^Total Weights Memory: (\d+) bytes"),
}
_KNOWN_NOISE = ("has Int64 binding", "Using default stream")

_log = logging.getLogger("emag_export.tensorrt")


@dataclass
class BuildLog:
    """Messages since the last :meth:`clear`."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)
    """Bytes: ``scratch`` and ``activation``, the largest over the profiles, and ``weights``."""

    def add(self, severity: str, text: str) -> None:
        """Keep one message, and pass it on to Python's logging one level quieter."""
        if severity in ("INTERNAL_ERROR", "ERROR"):
            self.errors.append(text)
        elif severity == "WARNING" and not any(noise in text for noise in _KNOWN_NOISE):
            self.warnings.append(text)
        elif severity == "INFO":
            for name, pattern in _FIGURES.items():
                if match := pattern.match(text):
                    self.memory[name] = max(self.memory.get(name, 0), int(match[1]))
        level = {"INFO": logging.INFO, "VERBOSE": logging.DEBUG}.get(severity, logging.INFO)
        if _log.isEnabledFor(level):
            _log.log(level, "%s", text)

    def clear(self) -> None:
        """Forget everything; one log serves the whole process."""
        self.errors.clear()
        self.warnings.clear()
        self.memory.clear()


_LOGS: dict[str, tuple[Any, BuildLog]] = {}


def log_of(module: ModuleType) -> tuple[Any, BuildLog]:
    """The module's logger and what it has collected: one per process, as TensorRT itself keeps one."""
    if module.__name__ not in _LOGS:
        sink = BuildLog()

        class Logger(module.ILogger):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                module.ILogger.__init__(self)

            def log(self, severity: Any, text: str) -> None:
                sink.add(str(severity).rpartition(".")[2], text)

        _LOGS[module.__name__] = (Logger(), sink)
    return _LOGS[module.__name__]
