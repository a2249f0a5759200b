"""The guides: tables are those of the code, and the changes that they show can be made and then work."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from emag_export import errors
from emag_export.engines.config import EngineConfig
from tests.command_line import commands

ROOT = Path(__file__).parent.parent
GUIDES = ROOT / "docs" / "guides"
MARKER = "<!-- run by tests/test_guides.py -->\n"
RUN_ALL = """
import shlex, sys
import emag_export
from emag_export.cli.main import main
assert emag_export.__file__.startswith(sys.argv[1]), emag_export.__file__
for line in sys.stdin:
    main(shlex.split(line)[1:], standalone_mode=False)
"""
"""Every line is a command of the changed checkout; one process, as starting one takes seconds."""


def rows(guide: str, heading: str) -> list[str]:
    """First cells of the table with this heading, without their backquotes."""
    text = (GUIDES / guide).read_text("utf-8")
    (body,) = re.findall(rf"^\| {re.escape(heading)} \|.*\n\|[-| ]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    return [name for line in body.splitlines() for name in re.findall(r"`(.*?)`", line.split("|")[1])]


def blocks(guide: str, language: str, *, marked: bool) -> Iterator[str]:
    """Fenced blocks of a language: those that say that they are run here, or the others."""
    text = (GUIDES / guide).read_text("utf-8")
    for match in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        if text[: match.start()].endswith(MARKER) == marked:
            yield match[1]


def test_the_table_of_commands_is_the_command_line() -> None:
    assert sorted(rows("command-line.md", "command")) == sorted(commands())


def test_the_table_of_engine_options_is_that_of_the_code() -> None:
    assert rows("python.md", "keyword") == [field.name for field in fields(EngineConfig)]


def test_every_error_is_in_the_table() -> None:
    others = {"Call", "EmagError"}
    assert set(rows("python.md", "in `emag_export.errors`")) == set(errors.__all__) - others


@pytest.fixture
def folder(tiny_bundle: Path, tmp_path: Path) -> Path:
    """Where the commands run: it holds a bundle and a file of prompts."""
    work = tmp_path / "work"
    shutil.copytree(tiny_bundle, work / "bundle")
    prompts = ("a large red circle on a blue background", "a small green square on a red background")
    (work / "prompts.txt").write_text("\n".join(prompts), "utf-8")
    return work


def changed_checkout(guide: str, path: Path) -> Path:
    """A copy of this checkout with the changes of a guide."""
    for name in ("emag_export", "engines", "runtime", "cli", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy2(ROOT / "pyproject.toml", path)
    changes = list(blocks(guide, "diff", marked=True))
    assert changes
    for change in changes:
        # No repository is looked for further up: git would take the paths as relative to that one.
        environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(path.parent)}
        words = ["git", "apply", "--verbose", "-"]
        done = subprocess.run(
            words, input=change, cwd=path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    return path


def in_checkout(checkout: Path, *words: str, cwd: Path, given: str = "") -> str:
    """Standard output of Python with the changed checkout."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env=environment,
        input=given,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_commands(guide: str, checkout: Path, folder: Path) -> str:
    (block,) = blocks(guide, "sh", marked=True)
    return in_checkout(checkout, "-c", RUN_ALL, str(checkout), cwd=folder, given=block)


def run_tests(checkout: Path, *words: str) -> None:
    said = in_checkout(checkout, "-m", "pytest", "-q", *words, cwd=checkout)
    assert re.search(r"\d+ passed", said) and "skipped" not in said, said


@pytest.mark.slow
def test_a_guidance_is_added(folder: Path, tmp_path: Path) -> None:
    checkout = changed_checkout("new-guidance.md", tmp_path / "checkout")
    said = run_commands("new-guidance.md", checkout, folder)
    assert "1.000 × CFG" in said and "power, w 4" in said
    assert (folder / "power.png").exists() and (folder / "evaluation" / "report.html").exists()
    files = ("tests/test_guidance.py", "tests/test_modifiers.py")
    run_tests(checkout, *files, "-k", "power or equal_perturbed")


@pytest.mark.rehearsal
def test_a_negative_is_added(tmp_path: Path) -> None:
    """And is held to what every kind is held to, on SD3, SD3.5 and DiT."""
    checkout = changed_checkout("new-negative.md", tmp_path / "checkout")
    files = ("tests/test_stateless.py", "tests/test_masked.py")
    run_tests(checkout, *files, "-k", "soften or SOFTEN")


@pytest.mark.rehearsal
def test_a_bundle_with_the_new_negative(folder: Path, tmp_path: Path) -> None:
    checkout = changed_checkout("new-negative.md", tmp_path / "checkout")
    said = run_commands("new-negative.md", checkout, folder)
    assert "passed the float32 thresholds" in said and "emag (soften)" in said
    assert (folder / "softened.png").exists()


@pytest.mark.rehearsal
def test_a_backend_is_added(folder: Path, tmp_path: Path) -> None:
    checkout = changed_checkout("new-backend.md", tmp_path / "checkout")
    code = list(blocks("new-backend.md", "python", marked=False))
    engine, opener = (
        next(block for block in code if start in block)
        for start in ("class OnnxReferenceEngine", "def open_onnx_reference")
    )
    module = f"{engine}\nfrom emag_export import Bundle, EngineConfig\n\n{opener}"
    (checkout / "emag_export" / "exporter" / "onnx_reference.py").write_text(module, "utf-8")
    said = run_commands("new-backend.md", checkout, folder)
    assert "passed the float32 thresholds" in said and (folder / "ring.png").exists()
    run_tests(checkout, "tests/test_backends.py", "-k", "table_of_backends")
