"""What an operator decides about a server, checked before anything is loaded."""

import ipaddress
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from emag_export.errors import InputError

__all__ = ["KEYS_VARIABLE", "ServerSettings", "read_keys"]

KEYS_VARIABLE = "EMAG_API_KEYS"
"""Keys in the environment, separated by commas."""
_LOG_FORMATS = ("text", "json")
_SHORTEST_KEY = 16


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Where to listen, whom to answer, and how much at most."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes a free one."""
    api_keys: tuple[str, ...] = ()
    """Whoever asks shows one of them; empty lets everybody in."""
    insecure: bool = False
    """Listen on a public address without keys."""
    max_images: int = 10
    """Of one request."""
    max_steps: int = 100
    max_pixels: int | None = None
    """Of one picture; None is four times the bundle's own size."""
    max_prompt: int = 4000
    """Characters, of the negative prompt too."""
    max_body: int = 1 << 20
    """Bytes of a request."""
    body_seconds: float = 20.0
    """For the head of a request to arrive, and again for its body."""
    stalled_seconds: float = 60.0
    """For a client to take at least something of an answer; then its connection is cut."""
    max_requests: int = 256
    """Requests for pictures at the same time, waiting ones included."""
    max_streams: int = 64
    """Of them, those whose answers are streams."""
    deadline: float = 300.0
    """Seconds for a picture where a request says nothing."""
    drain_timeout: float = 30.0
    """Seconds to finish what is there, once the server is told to end."""
    log_format: str = "text"
    log_prompts: bool = False

    def __post_init__(self) -> None:
        if self.log_format not in _LOG_FORMATS:
            raise InputError(
                f"there is no `log_format` {self.log_format!r}; choose {' or '.join(_LOG_FORMATS)}"
            )
        if not 0 <= self.port < 1 << 16:
            raise InputError(f"`port` is {self.port}; give a number from 0 to 65535")
        for name in ("max_images", "max_steps", "max_prompt", "max_body", "max_requests", "max_streams"):
            if getattr(self, name) < 1:
                raise InputError(f"`{name}` is {getattr(self, name)}; give 1 or more")
        for name in ("deadline", "drain_timeout", "body_seconds", "stalled_seconds"):
            if not getattr(self, name) > 0:
                raise InputError(f"`{name}` is {getattr(self, name)}; give more than 0 seconds")
        if short := [key for key in self.api_keys if len(key) < _SHORTEST_KEY]:
            raise InputError(
                f"a key has {len(short[0])} characters; make keys of {_SHORTEST_KEY} or more, for instance "
                "with: openssl rand -hex 32"
            )
        if not self.api_keys and not self.insecure and not _is_private(self.host):
            raise InputError(
                f"`host` {self.host} is open to others and no key was given: give `api_key_file`, listen on "
                "127.0.0.1, or say `insecure` if something in front of the server lets the right people in"
            )


def _is_private(host: str) -> bool:
    """Whether only this machine can reach it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_keys(path: Path | None, environment: Mapping[str, str]) -> tuple[tuple[str, ...], str | None]:
    """API keys from a file with one a line, and from the environment.

    Args:
        path: Lines that begin with ``#`` are passed over; None reads none.
        environment: With :data:`KEYS_VARIABLE`, perhaps.

    Returns:
        The keys, and a warning if others may read the file.

    Raises:
        InputError: If the file cannot be read, or holds no key.
    """
    keys = [key.strip() for key in environment.get(KEYS_VARIABLE, "").split(",")]
    warning = None
    if path is not None:
        try:
            lines, status = path.read_text("utf-8").splitlines(), path.stat()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"`api_key_file` {path} cannot be read: {error}") from error
        found = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not found:
            raise InputError(f"`api_key_file` {path} holds no key; write one a line")
        # A mounted secret belongs to somebody else, and has to be readable: that is no mistake.
        if status.st_uid == os.geteuid() and status.st_mode & (stat.S_IRGRP | stat.S_IROTH):
            warning = f"{path} can be read by others; let only its owner: chmod 600 {path}"
        keys += found
    return tuple(dict.fromkeys(key for key in keys if key)), warning
