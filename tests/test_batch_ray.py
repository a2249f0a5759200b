"""A batch on Ray Data: the same pictures, and none twice after a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.test_batch import ONE_LEVEL, ROWS, STEPS, batch, pictures, write_table

pytest.importorskip("ray", reason='pip install "emag-export[ray]"')
pytestmark = pytest.mark.ray


def test_two_replicas_draw_what_one_process_draws(tiny_bundle: Path, tmp_path: Path) -> None:
    rows = [{**row, "seed": number} for number, row in enumerate(ROWS * 12)]
    table, output = write_table(tmp_path / "t.jsonl", rows), tmp_path / "ray"
    words = [sys.executable, "-m", "emag_export.cli.main", "batch", str(tiny_bundle), "--prompts", str(table)]
    words += ["-o", str(output), *STEPS, "--steps", "20", "--ray", "--replicas", "2", "--json"]
    process = subprocess.Popen(words, start_new_session=True, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while len(list(output.rglob("*.png"))) < 5 and time.monotonic() < until:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    half = {path: path.stat().st_mtime_ns for path in output.rglob("*.png")}
    assert 5 <= len(half) < len(rows), "it was killed in the middle"
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["drawn"] + found["kept"] == len(rows) and found["kept"] >= len(half)
    assert all(path.stat().st_mtime_ns == when for path, when in half.items())
    alone = tmp_path / "alone"
    assert batch(tiny_bundle, table, alone, "--steps", "20").exit_code == 0
    ours, theirs = pictures(output), pictures(alone)
    assert ours.keys() == theirs.keys()
    assert all(np.abs(ours[name] - theirs[name]).max() <= ONE_LEVEL for name in ours)
