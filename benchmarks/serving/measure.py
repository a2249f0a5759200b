"""Loading real servers, one at a time and in turn."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from statistics import median
from typing import Any

import httpx2

from benchmarks.serving.client import send
from benchmarks.serving.servers import ALONE, CONTENDERS, TOGETHER, Server, running
from benchmarks.serving.traffic import STEPS, Served, percentile, poisson
from emag_export.bundle import Bundle

__all__ = [
    "CFG",
    "INFINITE",
    "LOADED",
    "MIXED",
    "SATURATED",
    "SATURATED_CFG",
    "UTILISATION",
    "measure",
    "summary",
]

INFINITE = float("inf")
MIXED, CFG = ("emag", "cfg"), ("cfg",)
"""Guidances that requests take in turn; diffusers knows the second only."""
SATURATED, SATURATED_CFG, LOADED = "saturated, mixed", "saturated, cfg", "loaded, mixed"
UTILISATION = 0.7
"""Of what one request at a time can serve: the load under which latencies are compared."""


def measure(bundle: Bundle, requests: int, rounds: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Load every contender in turn, round by round.

    Args:
        bundle: That is served.
        requests: Of every run.
        rounds: How often all of it is done.
        say: Told of every run.
    """
    rows: list[dict[str, Any]] = []

    def load(name: str, number: int, server: Server, rate: float, guidances: Sequence[str]) -> float:
        arrivals = poisson(requests, rate, guidances, seed=number)
        found = summary(send(server.url, arrivals))
        offered = None if rate == INFINITE else rate
        rows.append({"load": name, "round": number, "server": server.name, "rate": offered, **found})
        say(f"round {number + 1}, {name}: {server.name}, {found['throughput']:.2f} pictures a second")
        return float(found["throughput"])

    with ExitStack() as stack:
        servers = {name: stack.enter_context(running(name, bundle.path)) for name in CONTENDERS}
        for server in servers.values():
            send(server.url, poisson(3, INFINITE, CFG, seed=99))
        ours = (servers[ALONE], servers[TOGETHER])
        for number in range(rounds):
            for server in servers.values():
                load(SATURATED_CFG, number, server, INFINITE, CFG)
            alone, _ = (load(SATURATED, number, server, INFINITE, MIXED) for server in ours)
            for server in ours:
                load(LOADED, number, server, UTILISATION * alone, MIXED)
        together = servers[TOGETHER]
        previews = send(together.url, poisson(30, alone / 3, MIXED, seed=7), previews=True)
        # One after the other, each when the one before has been answered.
        lone = [send(together.url, [one])[0] for one in poisson(12, INFINITE, CFG, seed=8)]
        metrics = httpx2.get(f"{together.url}/metrics").text
    first = [one.first_preview for one in previews if one.first_preview is not None]
    return {
        "requests": requests,
        "rows": rows,
        "first_preview": {"median": median(first), "p95": percentile(first, 0.95)},
        "lone_seconds": {
            str(steps): median([one.seconds for one in lone if one.arrival.steps == steps]) for steps in STEPS
        },
        "scheduler_share": _scheduler_share(metrics),
    }


def summary(served: Sequence[Served]) -> dict[str, Any]:
    """Throughput, pictures a second, and latencies, seconds, of a run."""
    seconds = [one.seconds for one in served]
    short = [one.seconds for one in served if one.arrival.steps == min(STEPS)]
    begin = min(one.arrival.at for one in served)
    return {
        "throughput": len(served) / (max(one.ended for one in served) - begin),
        **{f"p{share}": percentile(seconds, share / 100) for share in (50, 95, 99)},
        "p99_short": percentile(short, 0.99),
    }


def _scheduler_share(metrics: str) -> float:
    """What the scheduler spends around calls, over what calls take, since the server started."""
    sums = dict.fromkeys(("emag_scheduler_seconds_total", "emag_call_seconds_sum"), 0.0)
    for line in metrics.splitlines():
        name = line.partition("{")[0]
        if name in sums:
            sums[name] += float(line.rpartition(" ")[2])
    around, calls = sums.values()
    return around / calls
