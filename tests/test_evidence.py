"""The suites of ``make eval``: what they share, and figures that sentences take from them."""

import json
from pathlib import Path

import pytest

from benchmarks.evidence.__main__ import take_pictures
from benchmarks.evidence.numbers import NUMBERS
from benchmarks.evidence.suites import SUITES
from tests.test_evaluation_run import PROMPTS, run


def test_a_suite_takes_the_pictures_that_another_has(tiny_bundle: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    first, second = tmp_path / "first", tmp_path / "second"
    assert run(tiny_bundle, first, "--prompts", str(prompts), "--methods", "none,cfg").exit_code == 0
    take_pictures(first, second)
    there = {path: path.stat().st_mtime_ns for path in second.rglob("*.png")}
    assert len(there) == 2 * 2 * 2
    done = run(tiny_bundle, second, "--prompts", str(prompts), "--methods", "cfg,apg", "--json")
    assert done.exit_code == 0, done.output
    assert all(path.stat().st_mtime_ns == when for path, when in there.items()), "none is drawn twice"
    of = {
        row["label"]: row["columns"] for row in json.loads((first / "results.json").read_text())["settings"]
    }
    cfg, apg = json.loads(done.stdout)["settings"]
    assert cfg["columns"] == of["cfg, w 4"]
    assert apg["columns"] != cfg["columns"]


def test_suites_share_with_one_that_ran_before_on_the_same_prompts() -> None:
    names = list(SUITES)
    for number, suite in enumerate(SUITES.values()):
        if suite.shares is not None:
            assert suite.shares in names[:number]
            other = SUITES[suite.shares]
            assert (other.prompts, other.model) == (suite.prompts, suite.model)
            assert suite.bundles.items() <= other.bundles.items()


def test_a_difference_is_rounded_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """It stands behind "at most"."""
    tests = [
        {"column": column, "setting": setting, "difference": {"mean": mean}}
        for column, setting, mean in (
            ("shape_iou", "emag@emag", -0.0021),
            ("shape_iou", "emag@emag-q", 0.001),
            ("shape_iou", "pag", -0.03),
            ("right", "emag@emag", 0.1),
        )
    ]
    monkeypatch.setattr(
        "benchmarks.evidence.numbers.load_results", lambda path: {"results": {"tests": tests}}
    )
    assert NUMBERS["tiny-sd3-emag-difference"]() == "0.003"
    assert NUMBERS["windows-difference"]() == "0.030"
