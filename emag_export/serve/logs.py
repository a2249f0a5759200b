"""Logs on standard error: a line an event, as text or as JSON; never a key, and a prompt only when asked."""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

__all__ = ["set_up_logs"]

_NAMES = ("emag", "uvicorn.error")


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        facts: dict[str, Any] = getattr(record, "facts", {})
        words = " ".join(f"{name}={_shown(value)}" for name, value in facts.items())
        stamp = datetime.fromtimestamp(record.created, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3]
        line = " ".join(part for part in (f"{stamp}Z", record.levelname, record.getMessage(), words) if part)
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        data = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            data["traceback"] = self.formatException(record.exc_info)
        return json.dumps(data, default=str)


def _shown(value: Any) -> str:
    """One word, whatever a client sent: nothing in it ends the line or speaks to a terminal."""
    text = str(value)
    if not text.isprintable():
        return json.dumps(text)
    return json.dumps(text, ensure_ascii=False) if not text or " " in text or '"' in text else text


def set_up_logs(log_format: str) -> None:
    """Write what the server has to say.

    Args:
        log_format: ``text`` or ``json``.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if log_format == "json" else _Text())
    for name in _NAMES:
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)
