"""The README's commands and code run as they stand."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_commands_and_code_run(tiny_bundle: Path, tmp_path: Path) -> None:
    """``build`` finds the copied bundle up to date; everything else runs for real."""
    shutil.copytree(tiny_bundle, tmp_path / "bundle")
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    commands = [shlex.split(line) for line in lines if line.startswith("emag-export")]
    assert len(commands) >= 6
    environment = {**os.environ, "COLUMNS": "200"}
    for command in commands:
        result = subprocess.run(
            [sys.executable, "-m", "emag_export.cli.main", *command[1:]],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, (command, result.stderr)
    assert (tmp_path / "circle.png").exists()
    assert (tmp_path / "report" / "report.html").exists()

    (code,) = blocks("python")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "triangle.png").exists()


def test_make_targets_exist() -> None:
    makefile = (Path(__file__).parent.parent / "Makefile").read_text("utf-8")
    for target in re.findall(r"make ([a-z]+)", README):
        assert f"\n{target}:" in makefile, target


def test_linked_files_exist() -> None:
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (Path(__file__).parent.parent / link).exists(), link
