"""The scheduler on a virtual clock: held against what was measured, and for machines that are not here."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from math import prod
from statistics import linear_regression, median
from typing import Any

from benchmarks.serving.measure import CFG, INFINITE, MIXED, SATURATED, SATURATED_CFG, summary
from benchmarks.serving.servers import ALONE, TOGETHER
from benchmarks.serving.simulation import Machine, simulate
from benchmarks.serving.traffic import Arrival, poisson
from emag_export.bundle import Bundle
from emag_export.errors import InputError
from emag_export.runtime.batching.banks import Room
from emag_export.runtime.batching.call_times import FOLDER, CallTimes, read_call_times
from emag_export.runtime.batching.options import BatchingOptions, room_for
from emag_export.runtime.keywords import amended
from emag_export.runtime.request import default_request, plan_request
from emag_export.runtime.sampling.plan import Plan

__all__ = ["extrapolate", "replay", "stored_table"]

_LOADS = {SATURATED_CFG: CFG, SATURATED: MIXED}


def stored_table(bundle: Bundle) -> CallTimes:
    """The table that a server measured at its start, beside the bundle.

    Raises:
        InputError: If there is none, or more than one.
    """
    found = sorted((bundle.path / FOLDER).glob("*.json"))
    if len(found) != 1:
        raise InputError(f"{bundle.path / FOLDER} holds {len(found)} tables of call times; one is needed")
    return read_call_times(found[0])


def replay(bundle: Bundle, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Throughput of the measured loads, by the virtual clock and by the real one.

    Args:
        bundle: That was served.
        found: Of ``measure``.
    """
    plan_of = _plans(bundle)
    lone = {int(steps): seconds for steps, seconds in found["lone_seconds"].items()}
    table, outside = _calibrated(stored_table(bundle), lone, plan_of)
    rooms = {ALONE: Room(per_call=1, live=1), TOGETHER: _room(bundle, table)}
    rows = []
    for server, room in rooms.items():
        machine = Machine(table=table, room=room, picture_seconds=outside, beside=False)
        for load, guidances in _LOADS.items():
            real = [row for row in found["rows"] if (row["load"], row["server"]) == (load, server)]
            virtual = []
            for row in real:
                arrivals = poisson(found["requests"], INFINITE, guidances, seed=row["round"])
                virtual.append(summary(simulate(bundle.contract, plan_of, arrivals, machine))["throughput"])
            measured, simulated = median(row["throughput"] for row in real), median(virtual)
            rows.append(
                {
                    "server": server,
                    "load": load,
                    "measured": measured,
                    "simulated": simulated,
                    "deviation": simulated / measured - 1,
                }
            )
    return rows


def _calibrated(
    table: CallTimes, lone: Mapping[int, float], plan_of: Callable[[Arrival], Plan]
) -> tuple[CallTimes, float]:
    """The table at the speed that the machine had when it was loaded, and a picture's seconds outside calls.

    A server measures its table once, at its start; a shared machine is faster or slower half an hour later.
    Requests that were alone tell both: their seconds are a straight line over their steps.
    """
    arrivals = [Arrival(at=0, seed=0, steps=steps, guidance="cfg", prompt="-") for steps in lone]
    inside = [table.run_seconds(plan_of(one)) for one in arrivals]
    speed, outside = linear_regression(inside, list(lone.values()))
    times = tuple(replace(row, seconds=row.seconds * speed) for row in table.times)
    return replace(table, times=times), max(0.0, outside)


def extrapolate(
    bundle: Bundle, table: CallTimes, *, requests: int, rate: float, replicas: int
) -> list[dict[str, Any]]:
    """What loads would meet on the machine of a table, whose text and decoding go on beside its calls.

    Args:
        bundle: Of any machine: its contract and defaults are what counts.
        table: Call times there.
        requests: Of the load.
        rate: Requests a second; infinity lets all arrive at once.
        replicas: Servers that share the load.
    """
    plan_of, arrivals = _plans(bundle), poisson(requests, rate, MIXED)
    rows = []
    for server, room in {ALONE: Room(per_call=1, live=1), TOGETHER: _room(bundle, table)}.items():
        machine = Machine(table=table, room=room, replicas=replicas)
        found = summary(simulate(bundle.contract, plan_of, arrivals, machine))
        rows.append({"server": server, "images a call": room.per_call, "replicas": replicas, **found})
    return rows


def _room(bundle: Bundle, table: CallTimes) -> Room:
    plan = plan_request(bundle, default_request(bundle, "-"))
    return room_for(table, plan, BatchingOptions(), state_bytes=prod((2, 4, len(bundle.contract.blocks))))


def _plans(bundle: Bundle) -> Callable[[Arrival], Plan]:
    @cache
    def plan(steps: int, guidance: str) -> Plan:
        request = amended(default_request(bundle, "-"), {"steps": steps, "guidance": guidance})
        return plan_request(bundle, request)

    return lambda arrival: plan(arrival.steps, arrival.guidance)
