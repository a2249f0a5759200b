"""What continuous integration relies on: ``.ci/run`` runs all checks of the Makefile and hides no failure."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CHECKS = ("ruff format --check .", "ruff check .", "mypy", "lint-imports", "python -m pytest")
TOOL = """#!/bin/sh
ran="$(basename "$0") $*"
echo "$ran" >> ran.txt
case "$ran" in "{failing}"*) exit 5;; esac
"""


def run(folder: Path, failing: str) -> tuple[int, list[str]]:
    """Exit status and what was run: the real script and Makefile, and tools that only say they were called.

    Args:
        folder: Made into a checkout whose environment is installed.
        failing: The command that ends with pytest's status for a run without tests.
    """
    tools = folder / ".venv" / "bin"
    tools.mkdir(parents=True)
    (folder / ".ci").mkdir()
    for name in ("Makefile", ".ci/run", "pyproject.toml", "constraints.txt"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
        os.utime(folder / name, (0, 0))
    (folder / ".venv" / ".installed").touch()
    for name in {check.split()[0] for check in CHECKS}:
        (tools / name).write_text(TOOL.format(failing=failing))
        (tools / name).chmod(0o755)
    done = subprocess.run(["bash", folder / ".ci" / "run"], capture_output=True, timeout=60, check=False)
    return done.returncode, (folder / "ran.txt").read_text().splitlines()


def test_every_check_is_run(tmp_path: Path) -> None:
    status, ran = run(tmp_path, "nothing")
    assert status == 0
    assert [line.startswith(check) for line, check in zip(ran, CHECKS, strict=True)] == [True] * len(CHECKS)


@pytest.mark.parametrize("check", CHECKS)
def test_a_check_that_fails_fails_the_run(check: str, tmp_path: Path) -> None:
    status, ran = run(tmp_path, check)
    assert status != 0
    assert ran[-1].startswith(check), "what stands behind it is run all the same"
