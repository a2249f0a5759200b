"""What continuous integration relies on."""

import subprocess
import sys
from pathlib import Path


def test_a_run_without_tests_fails(tmp_path: Path) -> None:
    (tmp_path / "Makefile").write_text(f"test:\n\t{sys.executable} -m pytest -c /dev/null --rootdir . -q\n")
    script = Path(__file__).parent.parent / ".ci" / "run"
    (tmp_path / ".ci").mkdir()
    copy = tmp_path / ".ci" / "run"
    copy.write_bytes(script.read_bytes())
    done = subprocess.run(["bash", str(copy)], capture_output=True, text=True, timeout=120, check=False)
    assert "no tests ran" in done.stdout
    assert done.returncode != 0
