"""The real GPU script, run in small on the CPU: tiny-sd3, four steps, one run."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.items import PARTS, Options
from benchmarks.gpu.lines import Lines, this_machine
from benchmarks.gpu.runner import Runner
from emag_export.kinds import Variant
from tests.bundles import TinyBundles

pytestmark = pytest.mark.rehearsal
STEPS, BLOCKS = 4, 10
NAME = "tiny-sd3-checkpoint-fp32"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Of the parts ``eager``, ``tensorrt``, which fails here, and ``onnxruntime``, in this order."""

    call: Callable[..., str]
    """Runs the script again; what it printed."""
    output: Path
    bundles: Path
    printed: str

    @property
    def path(self) -> Path:
        """Of the lines."""
        return self.output / "gpu-on-cpu.jsonl"

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text("utf-8").splitlines()]

    @property
    def speeds(self) -> dict[tuple[str, str], dict[str, Any]]:
        """(engine, method) to what was measured."""
        lines = [line for line in self.lines if line["axes"]["kind"] == "speed" and "result" in line]
        return {(line["axes"]["backend"], line["result"]["method"]): line["result"] for line in lines}


@pytest.fixture(scope="module")
def outcome(tiny_bundles: TinyBundles, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Bundles are copied to where the script would build them; it finds them up to date."""
    folder = tmp_path_factory.mktemp("gpu")
    bundles, output = folder / "bundles", folder / "results"
    query, maps = tiny_bundles(Variant.EMAG_Q, "float32"), tiny_bundles(Variant.EMAG, "float32")
    for name, path in ((f"{NAME}-emag-q", query), (f"{NAME}-emag", maps), ("tiny-fp32", query)):
        shutil.copytree(path, bundles / name)
    shutil.copytree(tiny_bundles(Variant.EMAG_Q, "float16"), bundles / "tiny-fp16")

    def call(*arguments: str) -> str:
        command = ["-m", "benchmarks.gpu", "--device", "cpu", "--model", "tiny-sd3", "--precision", "fp32"]
        command += ["--weights", "checkpoint", "--steps", str(STEPS), "--runs", "1", "--commit", "c0ffee"]
        command += ["--output", str(output), "--bundles", str(bundles), *arguments]
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    printed = call("--part", "eager", "tensorrt", "onnxruntime")
    return Outcome(call=call, output=output, bundles=bundles, printed=printed)


def test_every_engine_and_bundle_has_its_lines(outcome: Outcome) -> None:
    torch_eager, ours = "PyTorch eager", ("emag-q", "cfg", "emag")
    assert set(outcome.speeds) == {
        (torch_eager, "cfg"),
        (torch_eager, "two-pass emag-q"),
        (torch_eager, "two-pass emag"),
        ("torch", "cfg"),
        ("torch", "emag-q"),
        *(("onnxruntime", method) for method in ours),
    }


def test_a_line_says_all_that_its_figures_depend_on(outcome: Outcome) -> None:
    for line in outcome.lines:
        assert (line["commit"], line["driver"]) == ("c0ffee", "")
        assert line["device"]
        assert {"python", "torch", "emag-export"} <= line["versions"].keys()
        assert line["command"].startswith("python -m ")
        assert line["axes"]["kind"] != "build"  # nothing was built: all of it was there
        assert ("result" in line) != ("failed" in line)


def test_figures_are_those_of_the_run(outcome: Outcome) -> None:
    """Steps and blocks by hand: four steps are one tracked, two guided, one plain; averaged from block 3."""
    blocks = {
        "cfg": STEPS * 2 * BLOCKS,
        "emag-q": STEPS * 2 * BLOCKS + 2 * (BLOCKS - 3),
        "emag": STEPS * 2 * BLOCKS + 2 * (BLOCKS - 3),
        "two-pass emag-q": (STEPS + 3) * 2 * BLOCKS,
        "two-pass emag": (STEPS + 3) * 2 * BLOCKS,
    }
    for (_, method), found in outcome.speeds.items():
        counted = {phase: times["steps"] for phase, times in found["phases"].items()}
        assert counted == ({"plain": 4} if method == "cfg" else {"track": 1, "guide": 2, "plain": 1})
        assert found["row_blocks"] == blocks[method]
        assert found["tflop_per_image"] == pytest.approx(
            found["tflop_per_row_and_step"] * blocks[method] / BLOCKS
        )
        assert found["runs"] == [found["seconds_per_image"]]
        assert 0 < found["seconds_per_image"] <= found["host_seconds"]
        assert sum(times["steps"] * times["low"] for times in found["phases"].values()) <= (
            1e3 * found["seconds_per_image"] * (1 + 1e-9)
        )
        assert len(found["warm_up_seconds"]) == 2
        assert found["finite"]
        assert found["device_memory"] is None  # there is no GPU


def test_a_part_that_fails_leaves_its_reasons_and_the_others_alone(outcome: Outcome) -> None:
    failed = [line for line in outcome.lines if "failed" in line]
    assert {line["part"] for line in failed} == {"tensorrt"}
    assert all(line["axes"]["backend"] == "tensorrt" for line in failed)
    expected = sum(
        len(item.axes(_options(outcome.bundles))) for item in PARTS["tensorrt"] if item.kind != "build"
    )
    assert len(failed) == expected
    for line in failed:
        reason = line["failed"]
        assert "tensorrt" in reason
        assert reason.startswith("exit code" if line["axes"]["kind"] == "engine" else "not run, because")


def _options(bundles: Path) -> Options:
    return Options(
        bundles=bundles,
        device="cpu",
        model="tiny-sd3",
        weights="checkpoint",
        precision="fp32",
        pixels=64,
        steps=STEPS,
        runs=1,
    )


def test_summary_is_made_of_the_lines(outcome: Outcome) -> None:
    summary = json.loads(outcome.path.with_suffix(".json").read_text("utf-8"))
    rows = {(row["backend"], row["method"]): row for row in summary["speed"]}
    assert rows.keys() == outcome.speeds.keys()
    seconds = {key: found["seconds_per_image"] for key, found in outcome.speeds.items()}
    ours = rows["onnxruntime", "emag"]
    assert ours["to_cfg"] == seconds["onnxruntime", "emag"] / seconds["onnxruntime", "cfg"]
    assert ours["to_two_pass"] == seconds["onnxruntime", "emag"] / seconds["PyTorch eager", "two-pass emag"]
    assert rows["onnxruntime", "cfg"]["to_two_pass"] is None
    assert len(summary["failed"]) == sum("failed" in line for line in outcome.lines)
    assert summary["product"][0]["tflop_per_second"] > 0
    table = outcome.path.with_suffix(".md").read_text("utf-8")
    assert table in outcome.printed
    assert sum(line.startswith("| ") for line in table.splitlines()) == 2 + len(outcome.speeds)
    assert sum(line.startswith("* ") for line in table.splitlines()) == len(summary["failed"])


def test_the_same_command_runs_nothing_again(outcome: Outcome) -> None:
    before = outcome.path.read_bytes()
    printed = outcome.call("--part", "eager", "tensorrt", "onnxruntime")
    assert printed.count(": known") == len(
        {item for part in ("eager", "tensorrt", "onnxruntime") for item in PARTS[part] if not item.prepares}
    )
    assert outcome.path.read_bytes() == before


def test_what_was_lost_is_measured_again_and_nothing_else(outcome: Outcome) -> None:
    """As after a call that died between CFG and EMAG of one engine."""
    text = outcome.path.read_text("utf-8").splitlines(keepends=True)
    lost = next(
        number
        for number, line in enumerate(outcome.lines)
        if line["axes"].get("backend") == "onnxruntime" and line["axes"]["guidance"] == "emag"
    )
    outcome.path.write_text("".join([*text[:lost], text[lost][:40]]), "utf-8")
    outcome.call("--part", "onnxruntime")
    again = outcome.path.read_text("utf-8").splitlines()[lost + 1 :]
    assert [json.loads(line)["axes"]["guidance"] for line in again] == ["cfg", "emag", "emag"]


def test_comparison_is_a_line_with_its_figures(outcome: Outcome, tmp_path: Path) -> None:
    lines = Lines(tmp_path / "gpu.jsonl", this_machine("cpu"))
    runner = Runner(options=_options(outcome.bundles), lines=lines, seconds=600)
    compare = next(item for item in PARTS["compare"] if item.kind == "compare")
    build = next(item for item in PARTS["compare"] if compare.needs(item))
    assert (compare.backend, compare.bundle) == ("onnxruntime", "tiny-fp32")
    runner.run("compare", [build, compare])
    (line,) = lines.latest().values()
    found = line["result"]
    assert found["passed"]
    assert 0 < found["velocity_max_abs"] < 1e-4  # the threshold that "passed" stands for
    assert found["choices"] == found["choices_that_agree"] == 3  # no Delta in the plain step
