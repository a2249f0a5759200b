"""What the GPU script is made of, without a GPU: clock, counts, children, lines, and what is run again."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import torch

from benchmarks.gpu import runner as runner_module
from benchmarks.gpu.children import run_child
from benchmarks.gpu.flops import data_sheet_tflops, row_flops
from benchmarks.gpu.items import PARTS, Item, Options
from benchmarks.gpu.lines import Identity, Lines, key_of
from benchmarks.gpu.results import result_of
from benchmarks.gpu.runner import Runner
from benchmarks.gpu.speed import time_run
from emag_export.bench.memory import HostMemory
from emag_export.families import FAMILIES

IDENTITY = Identity(commit="c0ffee", device="a GPU", driver="580", versions={"torch": "2"})
PRODUCT = Item(kind="product", limit=60)


def options(folder: Path) -> Options:
    return Options(
        bundles=folder,
        device="cpu",
        model="tiny-sd3",
        weights="checkpoint",
        precision="fp32",
        pixels=64,
        steps=4,
        runs=1,
    )


def ignored(line: str, memory: HostMemory | None) -> None:
    """For children of which only the end matters."""


def steps(seconds: dict[str, float], log: list[str] | None = None) -> Iterator[Any]:
    for phase, duration in seconds.items():
        time.sleep(duration)
        if log is not None:
            log.append(phase)
        yield SimpleNamespace(plan=SimpleNamespace(phase=phase), latents=torch.zeros(1))


def test_steps_are_timed_where_they_end() -> None:
    run = time_run(steps({"track": 0.05, "guide": 0.1}), torch.device("cpu"))
    assert run.phases == ("track", "guide")
    assert run.seconds[0] >= 0.05
    assert run.seconds[1] >= 0.1
    assert run.host_seconds >= sum(run.seconds)


def test_on_a_gpu_the_host_waits_before_the_first_and_after_the_last_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Doubles of PyTorch's events and stream: what is asked of them, in order."""
    log: list[str] = []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: str) -> None:
            self.number = sum(entry.startswith("event") for entry in log)
            log.append(f"event in {stream}")

        def elapsed_time(self, other: "Event") -> float:
            assert log[-1] == "wait", "read before the device was waited for"
            return 10.0 * (other.number - self.number)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the caller's stream")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("wait"))
    run = time_run(steps({"plain": 0.0, "guide": 0.0}, log), torch.device("cuda"))
    event = "event in the caller's stream"
    assert log == ["wait", event, "plain", event, "guide", event, "wait"]
    assert run.seconds == (0.01, 0.01)


@pytest.mark.gpu
def test_events_agree_with_the_host_over_a_whole_run() -> None:
    matrix = torch.randn(4096, 4096, device="cuda")

    def work() -> Iterator[Any]:
        for _ in range(10):
            matrix @ matrix
            yield SimpleNamespace(plan=SimpleNamespace(phase="plain"), latents=matrix)

    time_run(work(), matrix.device)
    began = time.perf_counter()
    run = time_run(work(), matrix.device)
    wall = time.perf_counter() - began
    assert 0.5 * wall < sum(run.seconds) <= wall  # launching and waiting are the rest


def test_operations_of_sd3_medium_are_those_that_its_layers_add_up_to() -> None:
    """Products of layers and of attention by hand; embeddings and modulation, 0.08 %, are left out there."""
    width, image, text = 1536, 64 * 64, 333
    layers = 2 * width**2 * (24 * 12 * image + (23 * 12 + 3) * text)  # the last block's text ends at its keys
    attention = 24 * 4 * (image + text) ** 2 * width
    family = FAMILIES["sd3"]
    counted = row_flops(family, family.configs["sd3"]["transformer"], {"h": 64, "w": 64, "text": text})
    assert counted == pytest.approx(layers + attention, rel=2e-3)
    assert counted == pytest.approx(8.9e12, rel=1e-3)


def test_limit_is_known_for_half_precision_only() -> None:
    assert data_sheet_tflops("NVIDIA H100 80GB HBM3", "float16") == 989.4
    assert data_sheet_tflops("NVIDIA H100 80GB HBM3", "float32") is None
    assert data_sheet_tflops("some other GPU", "float16") is None


def test_child_is_read_line_by_line_and_its_end_is_told() -> None:
    seen: list[tuple[str, bool]] = []
    code = "import sys; print(1, flush=True); print(2); print('why', file=sys.stderr); sys.exit(3)"
    ended = run_child(
        [sys.executable, "-c", code], 60, lambda text, memory: seen.append((text, bool(memory)))
    )
    assert seen == [("1\n", True), ("2\n", True)]
    assert (ended.code, ended.late, ended.said) == (3, False, "why")
    killed = run_child([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], 60, ignored)
    assert (killed.code, killed.late) == (-9, False)


@pytest.mark.slow
def test_late_child_is_ended_with_everything_that_it_started() -> None:
    """The grandchild holds the pipe open: waiting for its end would take a minute."""
    lines: list[str] = []
    code = (
        "import subprocess, sys, time; "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
        "print(child.pid, flush=True); time.sleep(60)"
    )
    began = time.monotonic()
    ended = run_child([sys.executable, "-c", code], 8, lambda text, memory: lines.append(text))
    assert ended.late
    assert time.monotonic() - began < 30
    (grandchild,) = (int(line) for line in lines)
    until = time.monotonic() + 10
    while _runs(grandchild) and time.monotonic() < until:
        time.sleep(0.05)
    assert not _runs(grandchild)


def _runs(pid: int) -> bool:
    """A process that has ended stays in the table until its new parent has asked how."""
    return bool(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)


def test_lines_of_another_machine_and_lines_cut_off_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "results" / "gpu.jsonl"
    lines = Lines(path, IDENTITY)
    lines.append({"axes": {"kind": "a"}, "result": 1})
    Lines(path, replace(IDENTITY, driver="999")).append({"axes": {"kind": "b"}, "result": 2})
    with path.open("a") as file:
        file.write('{"axes": {"kind": "c"}, "resu')  # as left by a machine that went away
    lines.append({"axes": {"kind": "d"}, "result": 4})
    lines.append({"axes": {"kind": "a"}, "result": 5})
    assert {key: line["result"] for key, line in lines.latest().items()} == {
        key_of({"kind": "a"}): 5,
        key_of({"kind": "d"}): 4,
    }
    assert all(line["versions"] == {"torch": "2"} for line in lines.latest().values())


Making = Callable[..., Runner]


@pytest.fixture
def make(tmp_path: Path) -> Making:
    def runner(**fields: Any) -> Runner:
        lines = Lines(tmp_path / "gpu.jsonl", IDENTITY)
        return Runner(options=options(tmp_path), lines=lines, **{"seconds": 600.0, **fields})

    return runner


def test_item_that_takes_too_long_leaves_its_reason_and_is_retried_on_demand(make: Making) -> None:
    make(limit=0.2).run("eager", [PRODUCT])
    (line,) = make().lines.latest().values()
    assert line["failed"].startswith("not done in 0.2 s")
    said: list[str] = []
    make(report=said.append).run("eager", [PRODUCT])
    assert said == ["product: known"]
    make(retry=True).run("eager", [PRODUCT])
    (line,) = make().lines.latest().values()
    assert line["result"]["tflop_per_second"] > 0
    assert line["host_memory_peak"]["resident"] > 50_000_000  # an interpreter with PyTorch


def test_item_whose_part_is_over_is_left_for_the_next_call(
    make: Making, monkeypatch: pytest.MonkeyPatch
) -> None:
    never_begun = make(seconds=0.0)
    never_begun.run("eager", [PRODUCT])
    monkeypatch.setattr(runner_module, "_LEAST", 0.1)
    cut_off = make(seconds=0.5)
    cut_off.run("eager", [PRODUCT])
    assert never_begun.left == cut_off.left == [PRODUCT]
    assert not cut_off.lines.latest()


def test_what_needs_a_bundle_that_cannot_be_built_is_not_run(make: Making, tmp_path: Path) -> None:
    """No half-built bundle is measured in place of the right one."""
    runner = make()
    runner.options = replace(runner.options, model=str(tmp_path / "nowhere"))
    build, speed = Item(kind="build", limit=60, bundle="emag"), Item(kind="speed", limit=60, bundle="emag")
    runner.run("eager", [build, speed])
    first, second = runner.lines.latest().values()
    assert "nowhere" in first["failed"]
    assert second["axes"]["guidance"] == "emag"
    assert second["failed"].startswith("not run, because what it needs failed: build: exit code 3")


def test_every_part_prepares_before_it_measures() -> None:
    for part, items in PARTS.items():
        for index, item in enumerate(items):
            needed = [other for other in items if item.needs(other)]
            assert all(other in items[:index] for other in needed), part
            if item.kind in ("inspect", "compare", "speed", "engine"):
                assert any(other.kind == "build" for other in needed), part
            if item.backend and item.backend.startswith("tensorrt") and item.kind != "engine":
                assert any(other.kind == "engine" for other in needed), part


def test_maps_are_drawn_one_picture_at_a_time_and_engines_have_one_size(tmp_path: Path) -> None:
    """Four pictures' maps, or a range of sizes, need more memory than any GPU has."""
    everything = [item for items in PARTS.values() for item in items]
    assert {item.images for item in everything if item.bundle == "emag"} == {1}
    engines = [item for item in everything if item.kind == "engine"]
    for command in (item.command(options(tmp_path)) for item in engines):
        given = dict(pairwise(command))
        assert given["--height-range"] == given["--width-range"] == "64"
        assert given["--max-images"] in ("1", "4")


def test_figures_of_a_failed_comparison_are_kept() -> None:
    def step(error: Any, reference: int) -> dict[str, Any]:
        errors = {name: {"max_abs": error, "relative": 0.5} for name in ("cond", "ema_state")}
        return {"errors": errors, "choices": [{"reference": reference, "engine": 6}]}

    data = {
        "passed": False,
        "failures": [f"step {index}" for index in range(9)],
        "steps": [step(0.25, 6), step(0.125, 7)],
        "floor": None,
        "free": [{"max_abs": 1.0}, {"max_abs": 2.0}],
        "pictures": [],
    }
    kept = result_of("compare", data)
    assert kept is not None
    assert (kept["velocity_max_abs"], kept["average_relative"], kept["free_max_abs"]) == (0.25, 0.5, 2.0)
    assert (kept["choices"], kept["choices_that_agree"]) == (2, 1)
    assert (len(kept["failures"]), kept["failures_in_all"]) == (5, 9)
    worst = result_of("compare", {**data, "steps": [step(0.25, 6), step("nan", 6)]})
    assert worst is not None
    assert worst["velocity_max_abs"] == "nan"
    json.dumps(kept)
