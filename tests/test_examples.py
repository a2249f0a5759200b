"""Every example runs, and its folder's README lists it."""

import ast
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from emag_export.runtime.pictures.metadata import read_picture_record
from emag_export.runtime.pipeline import Pipeline

TESTS = Path(__file__).parent
FOLDER = TESTS.parent / "examples"
SCRIPTS = {path.name for path in FOLDER.glob("*.py")}
ELSEWHERE = {"diffusers_guider.py": "test_diffusers_guidance.py", "openai_client.py": "test_serve_process.py"}
"""Examples that another file runs: it has the server, or the models, that they need."""
HERE = {"first_picture.py", "compare_guidance.py", "stream_previews.py", "bare_onnxruntime.py"}

PROMPT = "a large red circle on a blue background"

RunExample = Callable[..., dict[str, Any]]


@pytest.fixture
def run_example(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> RunExample:
    """``run_example(name, *arguments)``: as ``python examples/NAME …`` in an empty folder; its globals."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *arguments: str | Path) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        return runpy.run_path(str(FOLDER / name), run_name="__main__")

    return run


def test_every_example_is_run_by_a_test() -> None:
    assert HERE | ELSEWHERE.keys() == SCRIPTS
    for name, file in ELSEWHERE.items():
        assert name in (TESTS / file).read_text("utf-8"), (name, file)
    here = Path(__file__).read_text("utf-8")
    assert all(here.count(f'"{name}"') > 1 for name in HERE)


def test_the_table_lists_every_file() -> None:
    text = (FOLDER / "README.md").read_text("utf-8")
    listed = re.findall(r"^\| \[`([^`]+)`\]\(([^)]+)\) \|", text, re.MULTILINE)
    files = {path.name for path in FOLDER.iterdir() if path.is_file()} - {"README.md"}
    assert all(name == link for name, link in listed)
    assert sorted(name for name, _ in listed) == sorted(files)


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_a_docstring_says_how_it_is_run_and_what_it_needs(name: str) -> None:
    said = ast.get_docstring(ast.parse((FOLDER / name).read_text("utf-8"))) or ""
    assert f"python examples/{name}" in said
    assert "Needs " in said
    assert re.search(r"\bout/|``out``", said), "where it writes"


def test_first_picture(
    tiny_bundle: Path, run_example: RunExample, capsys: pytest.CaptureFixture[str]
) -> None:
    run_example("first_picture.py", "--bundle", tiny_bundle, "--seed", "3")
    record = read_picture_record(Path("out/first.png"))
    assert (record.request.prompt, record.request.seed) == (PROMPT, 3)
    assert capsys.readouterr().out.splitlines() == ["source: hash", "bundle: reuse", "out/first.png"]


def test_compare_guidance(
    tiny_bundle: Path, run_example: RunExample, capsys: pytest.CaptureFixture[str]
) -> None:
    run_example("compare_guidance.py", tiny_bundle, "--methods", "cfg,emag", "--images", "2")
    with Image.open("out/guidance.png") as drawn:
        assert drawn.width >= 2 * 128 and drawn.height >= 2 * 128
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 2 and told[0].startswith("emag (emag-q), w 4, s 1.5: ")
    assert " 0 at most" not in told[0], "another guidance draws other pictures from the same seeds"


def test_stream_previews(tiny_bundle: Path, run_example: RunExample) -> None:
    left = run_example("stream_previews.py", tiny_bundle, "--stop-after", "3", "--output", "out/early.gif")
    assert len(left["frames"]) == 3
    whole = run_example("stream_previews.py", tiny_bundle)
    steps = whole["step"].steps
    with Image.open("out/early.gif") as early, Image.open("out/steps.webp") as film:
        assert (early.n_frames, film.n_frames) == (3, steps)  # type: ignore[attr-defined]
        film.seek(steps - 1)
        last = np.asarray(film.convert("RGB"), int)
    picture = np.asarray(whole["step"].images[0], int)
    assert abs(last - picture).mean() < 4, "the last frame is the picture, up to the loss of the format"


def imports(path: Path) -> set[str]:
    """Top-level packages that a script imports."""
    nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    named = {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.partition(".")[0] for name in plain | named}


def test_bare_onnxruntime_imports_nothing_of_ours() -> None:
    others = imports(FOLDER / "bare_onnxruntime.py") - set(sys.stdlib_module_names)
    assert others == {"numpy", "onnxruntime", "PIL", "tokenizers"}


def test_bare_onnxruntime_draws_the_picture_of_the_pipeline(
    tiny_bundle: Path, run_example: RunExample
) -> None:
    script = run_example("bare_onnxruntime.py", tiny_bundle, "--seed", "5")
    with Image.open("out/bare.png") as drawn:
        bare = np.asarray(drawn, int)
    # Of six pictures five were equal and one differed by one level of 255; from CFG all by 20 or more.
    with Pipeline.open(tiny_bundle, threads=1) as pipeline:
        (ours,) = pipeline.generate(PROMPT, guidance="emag", seed=5)
        (plain,) = pipeline.generate(PROMPT, guidance="cfg", seed=5)
    assert abs(bare - np.asarray(ours, int)).max() <= 1
    assert abs(bare - np.asarray(plain, int)).max() > 8, "so that a loop without averages would be seen"
    assert script["phase_of"](0, 28, {"emag_start": 250, "emag_delta": 50, "emag_stop": 50}) == "track"


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_bare_noise_is_that_of_torch(seed: int) -> None:
    noise = runpy.run_path(str(FOLDER / "bare_onnxruntime.py"))["initial_noise"](seed, (1, 8, 6, 4))
    wanted = torch.randn((1, 8, 6, 4), generator=torch.Generator().manual_seed(seed))
    # Logarithm and cosine of another library: rounding of numbers up to 4; 4.8e-7 was measured.
    np.testing.assert_allclose(noise, wanted.numpy(), rtol=0, atol=2e-6)
