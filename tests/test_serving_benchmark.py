"""The load benchmark's own parts: arrivals, the virtual clock, and the verdict."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.serving.__main__ import judge, main
from benchmarks.serving.measure import LOADED, SATURATED, SATURATED_CFG, summary
from benchmarks.serving.servers import ALONE, DIFFUSERS, TOGETHER
from benchmarks.serving.simulation import Machine, simulate
from benchmarks.serving.traffic import STEPS, Arrival, Served, percentile, poisson
from emag_export.bundle import Bundle
from emag_export.runtime.batching.banks import Room
from emag_export.runtime.batching.call_times import save_call_times
from emag_export.runtime.keywords import amended
from emag_export.runtime.request import default_request, plan_request
from emag_export.runtime.sampling.plan import Plan
from tests.test_call_times import table

INFINITE = float("inf")
TABLE = table({1: 1.0, 2: 1.2}, {1: 2.0, 2: 2.4})
ONE = Room(per_call=1, live=1)


def cfg_at(*times: float, steps: int = 10) -> list[Arrival]:
    return [Arrival(at=at, seed=i, steps=steps, guidance="cfg", prompt="-") for i, at in enumerate(times)]


@pytest.fixture
def run(tiny_bundle: Path) -> Any:
    bundle = Bundle(tiny_bundle)

    def plan_of(arrival: Arrival) -> Plan:
        request = default_request(bundle, "-")
        return plan_request(bundle, amended(request, {"steps": arrival.steps, "guidance": arrival.guidance}))

    def simulated(arrivals: list[Arrival], room: Room = ONE, **machine: Any) -> list[float]:
        served = simulate(bundle.contract, plan_of, arrivals, Machine(table=TABLE, room=room, **machine))
        return [one.ended for one in sorted(served, key=lambda one: one.arrival.seed)]

    return simulated


def test_the_virtual_clock_adds_up_what_the_table_says(run: Any) -> None:
    """Sums that anybody can check: ten calls of one second each, or of 1.2 for two images."""
    assert run(cfg_at(0, 0)) == pytest.approx([10, 20])
    assert run(cfg_at(0, 0), Room(per_call=2, live=2)) == pytest.approx([12, 12])
    assert run(cfg_at(0, 0), Room(per_call=1, live=2)) == pytest.approx([19, 20]), "turn by turn"
    assert run(cfg_at(0, 0), replicas=2) == pytest.approx([10, 10])
    assert run(cfg_at(0, 50)) == pytest.approx([10, 60]), "idle between two"
    assert run(cfg_at(0, 0), overhead=0.1) == pytest.approx([11, 22])


def test_whoever_arrives_in_a_run_joins_the_next_call(run: Any) -> None:
    first, second = run(cfg_at(0, 2.5), Room(per_call=2, live=2))
    assert first == pytest.approx(3 + 7 * 1.2), "three calls alone, seven together"
    assert second == pytest.approx(first + 3)


def test_work_outside_calls_is_beside_them_or_not(run: Any) -> None:
    assert run(cfg_at(0, 0), picture_seconds=1.0) == pytest.approx([11, 21])
    assert run(cfg_at(0, 0), picture_seconds=1.0, beside=False) == pytest.approx([11, 22])


def test_perturbed_rows_take_their_time(run: Any) -> None:
    (ended,) = run([Arrival(at=0, seed=0, steps=28, guidance="emag", prompt="-")])
    assert 28 < ended < 56


def test_arrivals_are_mixed_and_the_same_for_all() -> None:
    arrivals = poisson(300, 5.0, ("emag", "cfg"), seed=1)
    assert arrivals == poisson(300, 5.0, ("emag", "cfg"), seed=1) != poisson(300, 5.0, ("emag",), seed=2)
    assert {steps: [a.steps for a in arrivals].count(steps) for steps in STEPS} == dict.fromkeys(STEPS, 100)
    assert arrivals[-1].at == pytest.approx(60, rel=0.2), "300 at 5 a second"
    assert [a.at for a in arrivals] == sorted(a.at for a in arrivals)
    assert {a.at for a in poisson(3, INFINITE, ("cfg",))} == {0.0}


def test_a_summary_is_of_all_and_of_the_short_ones() -> None:
    served = [
        Served(arrival=arrival, seconds=seconds)
        for arrival, seconds in zip(cfg_at(0, 1, 2, steps=4), (1.0, 2.0, 6.0), strict=True)
    ]
    found = summary(served)
    assert found["throughput"] == pytest.approx(3 / 8) and found["p50"] == 2.0
    assert found["p99_short"] == pytest.approx(percentile([1, 2, 6], 0.99))


def test_a_missed_target_is_said() -> None:
    rows = [
        {"load": load, "server": server, "throughput": rate, "p99_short": wait}
        for load in (SATURATED, SATURATED_CFG, LOADED)
        for server, rate, wait in ((TOGETHER, 6.0, 3.0), (ALONE, 5.0, 5.0), (DIFFUSERS, 2.0, 9.0))
    ]
    found = {"rows": rows, "simulated": [{"deviation": -0.2}], "scheduler_share": 0.01}
    verdict = {row["what"]: (row["measured"], row["met"]) for row in judge(found)}
    assert list(verdict.values()) == [(1.2, False), (3.0, True), (0.6, False), (0.01, True), (0.2, False)]


def test_another_machine_is_a_table_away(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command itself; nothing is measured or served."""
    path = tmp_path / "h100.json"
    assert save_call_times(path, TABLE)
    words = ["--bundle", str(tiny_bundle), "--call-times", str(path), "--requests", "6", "--replicas", "2"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert ALONE in printed and TOGETHER in printed
