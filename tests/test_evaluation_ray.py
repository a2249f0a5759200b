"""An evaluation on Ray finds what one process finds."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_evaluation_run import PROMPTS, files, run, words

pytest.importorskip("ray", reason='pip install "emag-export[ray]"')
pytestmark = pytest.mark.ray


def test_two_replicas_write_the_same_report(tiny_bundle: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "p.txt"
    prompts.write_text("\n".join(PROMPTS))
    options = ("--prompts", str(prompts), "--methods", "cfg,emag")
    program = [sys.executable, "-m", "emag_export.cli.main"]
    command = [*program, *words(tiny_bundle, tmp_path / "ray"), *options, "--ray", "--replicas", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert run(tiny_bundle, tmp_path / "alone", *options).exit_code == 0
    assert files(tmp_path / "ray") == files(tmp_path / "alone")
