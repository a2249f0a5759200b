"""A real server in a process of its own, and a client for it."""

import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

__all__ = ["PROMPT", "Running", "running_server", "wait_for"]

PROMPT = "a large red circle on a blue background"
START_SECONDS = 90
# One thread, and no more images a call than tests need, so that little is measured at the start.
QUICK = ("--threads", "1", "--images-per-call", "4", "--live-images", "4")


@dataclass(kw_only=True)
class Running:
    """A server that listens."""

    process: "subprocess.Popen[str]"
    url: str
    log: list[str] = field(default_factory=list)
    """Lines of its standard error so far."""

    def generate(self, *, key: str | None = None, timeout: float = 60, **body: Any) -> httpx2.Response:
        """Ask for pictures of four steps, unless told otherwise."""
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        given = {"prompt": PROMPT, "num_inference_steps": 4, "seed": 1, **body}
        return httpx2.post(f"{self.url}/v1/images/generations", json=given, headers=headers, timeout=timeout)

    def figure(self, name: str) -> float:
        """Sum over all labels of one figure of ``/metrics``."""
        lines = httpx2.get(f"{self.url}/metrics", timeout=10).text.splitlines()
        found = [line for line in lines if re.match(rf"{name}(\{{| )", line)]
        return sum(float(line.rpartition(" ")[2]) for line in found)


def wait_for(condition: Any, what: str, seconds: float = 20) -> Any:
    """Until something is true."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(f"{what} did not come to pass in {seconds:g} seconds")


@contextmanager
def running_server(
    bundle: Path, *options: str, environment: dict[str, str] | None = None
) -> Iterator[Running]:
    """Start ``emag-export serve`` on a free port and wait until it listens; kill it at the end.

    Args:
        bundle: That is served.
        options: Of the command.
        environment: Instead of this process's own.
    """
    words = [sys.executable, "-m", "emag_export.cli.main", "serve", str(bundle), *QUICK, *options]
    if "--port" not in options:
        words += ["--port", "0"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment)
    log: list[str] = []
    reader = threading.Thread(target=_read, args=(process, log), daemon=True)
    reader.start()
    try:
        address = wait_for(lambda: _address(process, log), "a server that listens", START_SECONDS)
        yield Running(process=process, url=address, log=log)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        reader.join()
        assert process.stderr is not None
        process.stderr.close()


def _read(process: "subprocess.Popen[str]", log: list[str]) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        log.append(line.rstrip("\n"))


def _address(process: "subprocess.Popen[str]", log: list[str]) -> str | None:
    found = next((match for line in log if (match := re.match(r"serving .* at (http://\S+)", line))), None)
    if found is None and process.poll() is not None:
        raise AssertionError(f"the server ended with {process.returncode}: {log}")
    return None if found is None else found[1]
