"""The documents' blocks of code: found, sorted by what becomes of them, and run."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from click.testing import CliRunner

from emag_export.cli.main import main
from release.project import pyproject

ROOT = Path(__file__).parent.parent
DOCUMENTS = tuple(
    path
    for pattern in ("*.md", "docs/**/*.md", "examples/*.md", "deploy/**/*.md")
    for path in sorted(ROOT.glob(pattern))
    if path.name != "CHANGELOG.md"
)

_BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>not run|run by):? (?P<said>[^\n]*?) -->\n)?"
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
SHELL = "|<>;&$`(*"
"""A line with one of these is for a shell."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """One fenced block with a language."""

    document: Path
    line: int
    language: str
    text: str
    not_run: str | None = None
    """Why not."""
    run_by: str | None = None
    """The test that runs it, from the root of the repository."""

    @property
    def where(self) -> str:
        return f"{self.document.relative_to(ROOT)}:{self.line}"

    @property
    def runs(self) -> bool:
        return self.not_run is None and self.run_by is None


def blocks(document: Path) -> Iterator[Block]:
    """All fenced blocks of a document that name a language."""
    text = document.read_text("utf-8")
    for match in _BLOCK.finditer(text):
        if match["language"] in ("", "text"):
            continue
        lines = match["text"].splitlines()
        yield Block(
            document=document,
            line=text.count("\n", 0, match.start("language")) + 1,
            language=match["language"],
            text="\n".join(line.removeprefix(match["indent"]) for line in lines) + "\n",
            not_run=match["said"] if match["mark"] == "not run" else None,
            run_by=match["said"] if match["mark"] == "run by" else None,
        )


def run_block(block: Block, namespace: dict[str, Any]) -> None:
    """Run a block in the working directory; whatever is wrong with it is raised.

    Args:
        block: Of a document.
        namespace: Of the document's Python blocks, which share it.
    """
    assert block.language in _RUNNERS, f"{block.where}: run {block.language}, or say why not"
    _RUNNERS[block.language](block, namespace)


def _python(block: Block, namespace: dict[str, Any]) -> None:
    exec(compile("\n" * block.line + block.text, str(block.document), "exec"), namespace)


def _shell(block: Block, namespace: dict[str, Any]) -> None:
    for line in logical_lines(block.text):
        run_line(line)


def _console(block: Block, namespace: dict[str, Any]) -> None:
    for line in logical_lines(block.text):
        if line.startswith("$ "):
            run_line(line[2:])


def logical_lines(text: str) -> list[str]:
    """Without comments and with continued lines joined."""
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def run_line(line: str) -> None:
    """One command: ours in this process, installations and targets looked up, everything else in bash."""
    words = shlex.split(line, comments=True)
    if line.startswith("emag-export ") and not set(SHELL) & set("".join(words)):
        result = CliRunner().invoke(main, words[1:], catch_exceptions=False)
        assert result.exit_code == 0, f"{line}\n{result.output}"
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE), line
    elif words[:2] == ["pip", "install"]:
        _require_extras(words[2:])
    elif words[0] == "python" and words[1:2] == ["-m"] and words[2].startswith(("benchmarks", "tests")):
        assert find_spec(words[2]), line
    elif words[0] == "cd":
        assert words[1:] == [pyproject()["project"]["name"]], line
    elif words[0] == "git":
        assert (
            "clone" not in words
            or words[2].removesuffix(".git") == pyproject()["project"]["urls"]["Repository"]
        ), line
    else:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "COLUMNS": "200"}
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", line],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"


def _require_extras(words: list[str]) -> None:
    for word in words:
        match = re.fullmatch(r"emag-export(?:\[(?P<extras>[\w,-]+)\])?(?:[=<>~].*)?", word)
        if match and match["extras"]:
            unknown = set(match["extras"].split(",")) - set(pyproject()["project"]["optional-dependencies"])
            assert not unknown, f"pip install {word}: there is no extra {unknown}"


def _parsed(load: Callable[[str], object]) -> Callable[[Block, dict[str, Any]], None]:
    def parse(block: Block, namespace: dict[str, Any]) -> None:
        load(block.text)

    return parse


_RUNNERS: Mapping[str, Callable[[Block, dict[str, Any]], None]] = {
    "python": _python,
    "sh": _shell,
    "console": _console,
    "json": _parsed(json.loads),
    "yaml": _parsed(lambda text: list(yaml.safe_load_all(text))),
    "toml": _parsed(tomllib.loads),
}
