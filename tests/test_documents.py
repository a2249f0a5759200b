"""Every block of code in the documents runs, or says why not; links lead somewhere."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from release.project import pyproject
from tests.documents import DOCUMENTS, ROOT, Block, blocks, logical_lines, run_block, run_line

BLOCKS = {path: list(blocks(path)) for path in DOCUMENTS}
README = ROOT / "README.md"
RUNNING = [path for path, found in BLOCKS.items() if any(block.runs for block in found)]
ALL = [block for found in BLOCKS.values() for block in found]
RAW = "https://raw.githubusercontent.com/"


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.fixture
def folder(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory but for ``bundle``, which ``build`` finds up to date."""
    shutil.copytree(tiny_bundle, tmp_path / "bundle")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def pictures_of_the_readme(folder: Path) -> None:
    """The names that stand in it."""
    names = re.findall(r"-o (\w+\.png)|save\(\"(\w+\.png)\"\)", README.read_text("utf-8"))
    assert len(names) >= 2
    for name in names:
        assert (folder / "".join(name)).stat().st_size > 1000
    assert (folder / "report" / "report.html").exists()


def two_pipelines_draw_the_same_ring(folder: Path) -> None:
    one, other = (np.asarray(Image.open(folder / f"{name}.png"), int) for name in ("ring", "the-same-ring"))
    assert abs(one - other).max() <= 1, "rounding"


LEFT = {
    "README.md": pictures_of_the_readme,
    "docs/guides/diffusers.md": two_pipelines_draw_the_same_ring,
}
"""Document to what is checked of the files that its code leaves."""


LONG = ("docs/guides/evaluation.md", "docs/guides/lora.md", "docs/guides/quantisation.md")
"""Documents that export models of their own, for ``make rehearsal``."""


@pytest.mark.parametrize(
    "document",
    [
        pytest.param(path, id=named(path), marks=pytest.mark.rehearsal if named(path) in LONG else ())
        for path in RUNNING
    ],
)
def test_code_of_a_document_runs(document: Path, folder: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in BLOCKS[document]:
        if block.runs:
            run_block(block, namespace)
    if check := LEFT.get(named(document)):
        check(folder)


@pytest.mark.parametrize("block", [block for block in ALL if not block.runs], ids=lambda block: block.where)
def test_what_is_not_run_here_has_a_reason_or_a_test(block: Block) -> None:
    if block.run_by is None:
        assert block.not_run is not None
        assert len(block.not_run.split()) >= 3, "say why"
        return
    test = (ROOT / block.run_by).read_text("utf-8")
    assert block.document.name in test, f"{block.run_by} does not read {block.document.name}"


def test_something_is_run() -> None:
    assert len(RUNNING) >= 15
    unrun = [block for block in ALL if block.not_run is not None]
    assert sum(block.runs for block in ALL) > 2 * len(unrun)


def test_a_wrong_block_fails(folder: Path) -> None:
    """The runner itself: each of its kinds notices what is wrong."""

    def of(language: str, text: str) -> Block:
        return Block(document=README, line=1, language=language, text=text)

    for language, text in (
        ("python", "assert False"),
        ("sh", "emag-export plan nowhere"),
        ("sh", "make nothing"),
        ("sh", 'pip install "emag-export[nothing]"'),
        ("sh", "python -m benchmarks.nothing"),
        ("sh", "git clone https://example.org/emag-export"),
        ("sh", "false | cat"),
        ("console", "$ false"),
        ("fortran", "END"),
        ("json", "{"),
        ("yaml", "a: ["),
        ("toml", "a"),
    ):
        with pytest.raises((AssertionError, ValueError, yaml.YAMLError)):
            run_block(of(language, text), {})
    run_block(of("console", "false\n$ true\nwhat it prints"), {})
    run_line("emag-export plan bundle  # a comment")
    assert logical_lines("a \\\n   b\n# c\nd") == ["a  b", "d"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_links_lead_to_files(document: Path) -> None:
    text = re.sub(r"```.*?```", "", document.read_text("utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\((?![a-z]+:|#)([^)#\s]+)", text):
        assert (document.parent / link).exists(), link


def test_links_of_the_readme_are_whole_and_lead_to_files() -> None:
    """The package index shows it, where relative links lead nowhere."""
    text = README.read_text("utf-8")
    assert not re.findall(r"\]\((?!https?://|#)", text), "write it with the address of the repository"
    urls = pyproject()["project"]["urls"]
    repository, site = urls["Repository"].rstrip("/"), urls["Documentation"].rstrip("/")
    raw = repository.replace("https://github.com/", RAW)
    found = re.findall(rf"(?:{repository}/(?:blob|tree)/main|{raw}/main)/([^)\s\"#]+)", text)
    assert len(found) >= 6
    for path in found:
        assert (ROOT / path).exists(), path
    for page in re.findall(rf"{site}/([^)\s#]*)", text):
        name = page.strip("/") or "index"
        assert (ROOT / "docs" / f"{name}.md").exists(), page
