"""What Ray adds to a server: ``python -m benchmarks.serving.on_ray`` (five minutes).

A server without Ray and one with two replicas run at the same time, one core each, and are asked in turn.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import httpx2
import psutil  # type: ignore[import-untyped]
from rich.console import Console

from benchmarks.results import FOLDER, write_results
from benchmarks.serving.servers import free_port, wait_until_ready
from benchmarks.targets import run_command

__all__ = ["RESULTS", "ROWS", "axes", "main"]

RESULTS = FOLDER / "serving-ray.json"
_SERVE = (sys.executable, "-m", "emag_export.cli.main", "-q", "serve")
_REPLICAS, _REQUESTS, _STEPS, _KILLED = 2, 240, 4, 3
"""Replicas, requests of a server, steps of a picture, and how often a replica is killed."""
_KEY = "k" * 32
_HEADERS = {"Authorization": f"Bearer {_KEY}"}
_SECONDS = 120
"""In which a killed replica has to be back."""
ROWS = {
    "start": "start until it answers",
    "picture": f"a picture of {_STEPS} steps, median of {_REQUESTS}",
    "model": "`GET /v1/models/…`, median",
    "replica": "memory of an idle server or replica (proportional set size)",
    "others": "and beside the replicas",
    "back": f"a killed replica is back, median of {_KILLED}",
}
"""What is measured, by the name in the results."""


def axes() -> dict[str, Any]:
    """What is varied."""
    return {"servers": ["plain", "ray"], "replicas": _REPLICAS, "steps": _STEPS, "requests": _REQUESTS}


@dataclass(frozen=True, kw_only=True)
class _Server:
    process: "subprocess.Popen[bytes]"
    client: httpx2.Client
    """Keeps its connection."""
    start: float
    """Seconds until it answered."""

    def picture(self) -> None:
        """Ask for one and wait for it."""
        body = {"prompt": "a large red circle on a blue background", "seed": 1, "num_inference_steps": _STEPS}
        self.client.post("/v1/images/generations", json=body).raise_for_status()

    def get(self, path: str) -> httpx2.Response:
        """What stands at a path."""
        return self.client.get(path).raise_for_status()

    def ready(self) -> set[str]:
        """Names of the replicas that are."""
        try:
            text = self.get("/metrics").text
        except httpx2.HTTPError:
            return set()
        found = re.findall(r'^emag_ready\{.*?replica="(.*?)".*\} (\S+)$', text, re.MULTILINE)
        return {name for name, value in found if float(value)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write the results file."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    bundle = Path(words[0]) if words else Path("out/bench/tiny")
    console = Console(highlight=False)
    run_command("build", "--model", "tiny-sd3", "-o", str(bundle))
    with ExitStack() as stack:
        plain = stack.enter_context(_running(bundle))
        ray = stack.enter_context(_running(bundle, "--ray", "--replicas", str(_REPLICAS)))
        _wait(lambda: len(ray.ready()) == _REPLICAS)
        found = {"plain": {"start": plain.start}, "ray": {"start": ray.start}}
        servers = {"plain": plain, "ray": ray}
        model = plain.get("/v1/models").json()["data"][0]["id"]
        console.print("both servers answer")
        found["plain"]["replica"] = _own(psutil.Process(plain.process.pid))
        found["ray"] |= _memory(ray)
        asks: dict[str, Callable[[_Server], object]] = {
            "picture": _Server.picture,
            "model": lambda server: server.get(f"/v1/models/{model}"),
        }
        for what, ask in asks.items():
            for name, seconds in _alternate(servers, ask).items():
                found[name][what] = seconds
        found["ray"]["back"] = median(_killed(ray) for _ in range(_KILLED))
    for name, values in found.items():
        console.print(name, values)
    write_results(
        RESULTS,
        command="python -m benchmarks.serving.on_ray",
        axes=axes(),
        ray=version("ray"),
        found=found,
    )
    return 0


@contextmanager
def _running(bundle: Path, *options: str) -> Iterator[_Server]:
    port, began = free_port(), time.monotonic()
    words = [*_SERVE, str(bundle), "--port", str(port), "--threads", "1", *options]
    process = subprocess.Popen(words, env={**os.environ, "EMAG_API_KEYS": _KEY}, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready(process, url)
        start = time.monotonic() - began
        with httpx2.Client(base_url=url, headers=_HEADERS, timeout=60) as client:
            yield _Server(process=process, client=client, start=start)
    finally:
        process.terminate()
        process.wait(60)


def _alternate(servers: dict[str, _Server], ask: Callable[[_Server], object]) -> dict[str, float]:
    """Name to the median seconds of an answer, asked in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in servers}
    for number in range(_REQUESTS + 2):
        for name, server in servers.items():
            began = time.perf_counter()
            ask(server)
            if number >= 2:  # the first ones open connections and fill caches
                seconds[name].append(time.perf_counter() - began)
    return {name: median(values) for name, values in seconds.items()}


def _replicas(server: _Server) -> list[psutil.Process]:
    """Those with an engine: Ray writes what a process is into its command line."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    return [child for child in children if "ServeReplica:emag-export:model-" in " ".join(child.cmdline())]


def _memory(server: _Server) -> dict[str, float]:
    """Bytes of a replica, of the front, of the command, and of everything that is Ray's."""
    command = psutil.Process(server.process.pid)
    replicas = _replicas(server)
    others = [child for child in command.children(recursive=True) if child not in replicas]
    fronts = [child for child in others if "ServeReplica:emag-export:" in " ".join(child.cmdline())]
    return {
        "replica": median(map(_own, replicas)),
        "front": sum(map(_own, fronts)),
        "command": _own(command),
        "of_ray": sum(_own(child) for child in others if child not in fronts),
    }


def _own(process: psutil.Process) -> float:
    try:
        return float(process.memory_full_info().pss)
    except psutil.NoSuchProcess:
        return 0.0


def _killed(server: _Server) -> float:
    """Seconds from the end of one replica until all are there again."""
    before, began = server.ready(), time.monotonic()
    _replicas(server)[0].send_signal(signal.SIGKILL)
    _wait(lambda: len(after := server.ready()) == _REPLICAS and after != before)
    return time.monotonic() - began


def _wait(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + _SECONDS
    while not condition():
        if time.monotonic() > until:
            raise RuntimeError(f"this did not come to pass in {_SECONDS} seconds")
        time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main())
