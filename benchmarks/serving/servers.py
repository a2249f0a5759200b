"""Contenders: each a process of its own, started once, loaded in turn."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2

__all__ = [
    "ALONE",
    "CONTENDERS",
    "DIFFUSERS",
    "TOGETHER",
    "Server",
    "free_port",
    "running",
    "wait_until_ready",
]

TOGETHER, ALONE, DIFFUSERS = "step batching", "one at a time", "diffusers"
_SERVE = (sys.executable, "-m", "emag_export.cli.main", "-q", "serve")
_ENDLESS = ("--max-queue", "10000", "--max-requests", "10000", "--deadline", "3600")
"""Nobody is refused: a refusal would shorten the queue of the slower contender."""
CONTENDERS: Mapping[str, Sequence[str]] = {
    TOGETHER: (*_SERVE, "{bundle}", "--port", "{port}", *_ENDLESS),
    ALONE: (
        *(*_SERVE, "{bundle}", "--port", "{port}", *_ENDLESS),
        *("--images-per-call", "1", "--live-images", "1"),
    ),
    DIFFUSERS: (sys.executable, "-m", "benchmarks.serving.diffusers_server", "{port}"),
}
"""Name to the command that starts it."""
_START_SECONDS = 180


@dataclass(frozen=True, kw_only=True)
class Server:
    """A contender that answers."""

    name: str
    url: str


@contextmanager
def running(name: str, bundle: Path) -> Iterator[Server]:
    """Start a contender, wait until it is ready, and stop it at the end.

    Args:
        name: Of :data:`CONTENDERS`.
        bundle: That is served.

    Raises:
        RuntimeError: If it ends, or does not become ready.
    """
    port = free_port()
    command = [word.format(bundle=bundle, port=port) for word in CONTENDERS[name]]
    process = subprocess.Popen(command)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready(process, url)
        yield Server(name=name, url=url)
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def free_port() -> int:
    """A port that nobody listens at now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def wait_until_ready(
    process: "subprocess.Popen[bytes]",
    url: str,
    *,
    path: str = "/health/ready",
    seconds: float = _START_SECONDS,
) -> None:
    """Until a server says that it is ready.

    Args:
        process: Of the server.
        url: Of the server.
        path: Where it says so.
        seconds: That are waited at most.

    Raises:
        RuntimeError: If it ends, or does not become ready.
    """
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if process.poll() is not None:
            raise RuntimeError(f"{process.args!r} ended with {process.returncode}")
        try:
            if httpx2.get(f"{url}{path}", timeout=5).status_code == 200:
                return
        except httpx2.TransportError:
            pass
        time.sleep(0.2)
    raise RuntimeError(f"{url} was not ready after {seconds:g} seconds")
