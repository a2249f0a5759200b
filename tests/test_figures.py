"""Drawings are what contract and results say, and readable as files."""

from xml.etree import ElementTree

import numpy as np
import pytest

from benchmarks.figures import cost
from benchmarks.figures.drawings import FIGURES, file_of, written
from benchmarks.figures.hero import largest
from benchmarks.figures.subject import sd3
from benchmarks.figures.svg import DARK, LIGHT, PALETTES, Palette
from benchmarks.results import load_results
from emag_export.evaluation.metrics.protocol import Pixels

SVG = "{http://www.w3.org/2000/svg}"


def texts(name: str) -> list[str]:
    tree = ElementTree.fromstring(written(name, LIGHT))
    return [str(element.text) for element in tree.iter(f"{SVG}text")]


@pytest.mark.parametrize("palette", PALETTES, ids=lambda palette: palette.name)
@pytest.mark.parametrize("name", FIGURES)
def test_a_drawing_is_what_its_sources_say(name: str, palette: Palette) -> None:
    assert file_of(name, palette).read_text("utf-8") == written(name, palette), (
        "run: python -m benchmarks.figures"
    )


@pytest.mark.parametrize("name", FIGURES)
def test_only_colours_differ_between_backgrounds(name: str) -> None:
    light, dark = (ElementTree.fromstring(written(name, palette)) for palette in (LIGHT, DARK))
    for one, other in zip(light.iter(), dark.iter(), strict=True):
        differing = {key for key in one.attrib if one.attrib[key] != other.attrib[key]}
        assert differing <= {"fill", "stroke"}
        assert one.text == other.text


@pytest.mark.parametrize("name", FIGURES)
def test_nothing_lies_outside(name: str) -> None:
    root = ElementTree.fromstring(written(name, LIGHT))
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    assert str(root[0].text).strip(), "a title for people who do not see it"
    for element in root.iter(f"{SVG}rect"):
        x, y, w, h = (float(element.attrib[key]) for key in ("x", "y", "width", "height"))
        assert x >= 0 and y >= 0 and x + w <= width and y + h <= height
    for element in root.iter(f"{SVG}text"):
        assert 0 <= float(element.attrib["x"]) <= width
        assert 0 < float(element.attrib["y"]) <= height


def test_the_architecture_names_every_tensor_of_the_contract() -> None:
    contract, found = sd3().contract, texts("architecture")
    for spec in (*contract.graph.inputs, *contract.graph.outputs):
        assert spec.name in found


def test_the_fork_has_a_square_for_every_row_block() -> None:
    """Rows of 24 blocks: 2 of CFG, 4 of two passes, 3 of the fork less the 6 blocks below it."""
    tree = ElementTree.fromstring(written("fork", LIGHT))
    squares = [element for element in tree.iter(f"{SVG}rect") if element.attrib["width"] == "18"]
    assert len(squares) == 2 * 24 + 4 * 24 + 3 * 24 - 6


def test_bars_are_as_long_as_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """And follow the results."""
    before = written("cost", LIGHT)
    found = load_results(cost._MEASURED)
    rows = found["reports"]["256 px"]["results"]
    ours = next(row for row in rows if row["method"] == "emag-q")
    ours["to_cfg"]["ratio"] = 1.5
    monkeypatch.setattr("benchmarks.figures.cost.load_results", lambda path: found)
    after = written("cost", LIGHT)
    assert after != before
    widths = {element.attrib["width"] for element in ElementTree.fromstring(after).iter(f"{SVG}rect")}
    assert f"{1.5 * cost._UNIT:g}" in widths
    assert "1.50" in after


def test_the_prompt_and_scale_with_the_largest_difference_are_shown() -> None:
    """In the mean over all seeds: one picture alone that differs much does not decide."""

    def grey(*values: int) -> list[Pixels]:
        return [np.full((2, 2, 3), value, np.uint8) for value in values]

    drawn = {
        ("none", "a", None): grey(200, 200),
        ("cfg", "a", None): grey(0, 0),
        ("cfg", "b", None): grey(100, 100),
        ("emag", "a", 1.5): grey(30, 0),
        ("emag", "a", 3.0): grey(45, 0),
        ("emag", "b", 1.5): grey(80, 75),
        ("emag", "b", 3.0): grey(125, 130),
    }
    assert largest(drawn) == ("b", 3.0)
