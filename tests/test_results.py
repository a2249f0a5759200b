"""Numbers in README and docs are those of the results files, which say where they come from."""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks import (
    compared,
    families,
    full_size,
    fusion,
    golden_errors,
    operators,
    prompt_accuracy,
    render,
    targets,
)
from benchmarks.evidence import __main__ as evidence
from benchmarks.evidence.suites import SUITES
from benchmarks.figures import hero
from benchmarks.quantised import __main__ as quantised
from benchmarks.results import FOLDER, commit, load_results, processor_slug, write_results
from benchmarks.serving import __main__ as serving
from benchmarks.serving import on_ray, on_triton, soak
from tests.mutants import report as mutants

FILES = sorted(FOLDER.rglob("*.json"))
AXES: dict[str, Callable[[], dict[str, Any]]] = {
    "compared.json": compared.axes,
    "full-size.json": full_size.axes,
    "fusion.json": fusion.axes,
    "golden_errors.json": golden_errors.axes,
    "hero.json": hero.axes,
    "mutants.json": mutants.axes,
    "operators.json": operators.axes,
    **{
        f"prompt_accuracy/{model}.json": partial(prompt_accuracy.axes, model)
        for model in prompt_accuracy.SUBJECTS
    },
    **{
        evidence.results_file(name, tuned=tuned).relative_to(FOLDER).as_posix(): partial(evidence.axes, name)
        for name in SUITES
        for tuned in (False, True)
    },
    "bench": targets.axes,
    "families": families.axes,
    "quantised": quantised.axes,
    "serving": serving.axes,
    "serving-ray.json": on_ray.axes,
    "serving-triton.json": on_triton.axes,
    "soak.json": soak.axes,
}
"""File or folder of results to what the code that writes it varies."""


@pytest.mark.parametrize("path", render.DOCUMENTS, ids=lambda path: path.name)
def test_tables_are_what_the_results_say(path: Path) -> None:
    text = path.read_text("utf-8")
    assert render.render(text) == text, "run: python -m benchmarks.render"


def test_every_table_and_number_stands_somewhere() -> None:
    text = "".join(path.read_text("utf-8") for path in render.DOCUMENTS)
    assert set(re.findall(r"<!-- table: ([\w-]+) -->", text)) == set(render.TABLES)
    assert set(re.findall(r"<!-- number: ([\w-]+) -->", text)) == set(render.NUMBERS)


def test_a_changed_number_changes_the_document(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a\n<!-- table: prompt-accuracy -->\nold\n<!-- end of table -->\nb"
    rendered = render.render(text)
    assert "old" not in rendered
    assert rendered.startswith("a\n")
    assert rendered.endswith("\nb")

    def better(path: Path) -> dict[str, Any]:
        found = load_results(path)
        found["rows"][0]["accuracy"]["right"] = 0.991
        return found

    monkeypatch.setattr("benchmarks.render.load_results", better)
    assert "99.1 %" in render.render(text) != rendered


def test_a_number_within_a_sentence_is_written_anew() -> None:
    text = "costs <!-- number: two-pass -->9<!-- / --> times, <!-- number: fork --><!-- / -->"
    wanted = "costs <!-- number: two-pass -->2<!-- / --> times, <!-- number: fork -->1.24<!-- / -->"
    assert render.render(text) == wanted


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_results_say_where_they_come_from(path: Path) -> None:
    found = json.loads(path.read_text("utf-8"))
    assert re.fullmatch(r"[0-9a-f]{40}", found["commit"]), (
        "measured with uncommitted code, or outside a repository"
    )
    assert found["machine"]["processor"]
    assert found["machine"]["versions"]["torch"]
    assert found["machine"]["command"].startswith(("python -m benchmarks.", "make "))
    assert found["axes"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_results_have_the_axes_that_the_code_measures(path: Path) -> None:
    axes = AXES.get(path.relative_to(FOLDER).as_posix()) or AXES.get(path.parent.name)
    if axes is None:
        assert path.name in ("memory.json",), "say what this file varies"
        return
    assert json.loads(path.read_text("utf-8"))["axes"] == json.loads(json.dumps(axes()))


def test_a_file_is_written_with_all_of_it(tmp_path: Path) -> None:
    write_results(tmp_path / "a" / "b.json", command="make x", axes={"n": [1, 2]}, rows=[3])
    found = json.loads((tmp_path / "a" / "b.json").read_text("utf-8"))
    assert (found["axes"], found["rows"], found["machine"]["command"]) == ({"n": [1, 2]}, [3], "make x")
    assert found["commit"] == commit()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.json"]


def test_a_processor_names_a_file() -> None:
    assert processor_slug({"processor": "Intel(R) Xeon(R) 6975P-C"}) == "intel-r-xeon-r-6975p-c"
