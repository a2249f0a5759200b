"""Our forked graph follows the recorded trajectories of the released two-pass algorithm."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from emag_export.engines.eager import EagerEngine
from tests.conftest import GOLDEN, Exporter, golden_fork
from tests.golden.case import GoldenCase, replay
from tests.thinned import mostly_slow

CASES = sorted(path.stem for path in GOLDEN.glob("*.npz"))


@pytest.fixture(params=mostly_slow(CASES, "query-canonical", "map-canonical"))
def case(request: pytest.FixtureRequest) -> GoldenCase:
    return GoldenCase.load(GOLDEN / f"{request.param}.npz")


def test_all_recordings_are_here() -> None:
    assert len(CASES) == 10


# Tolerances: GoldenCase.tolerance, with the measurement behind it.
def test_torch_follows_the_recording(case: GoldenCase) -> None:
    fork = golden_fork(case.variant, case.renorm)
    engine = EagerEngine(fork, fork.contract.graph)
    assert replay(case, engine, fork.contract).error <= case.tolerance


# A replay takes a fifth of a second, but exporting its graph half a minute.
ONE_PART = [pytest.param(name, marks=pytest.mark.rehearsal) for name in ("map-imgimg", "map-imgtxt")]


@pytest.mark.parametrize("name", [*(name for name in CASES if "-img" not in name), *ONE_PART])
@pytest.mark.parametrize("own", [False, True], ids=["standard graph", "its own graph"])
def test_onnxruntime_follows_the_recording(name: str, exported: Exporter, own: bool) -> None:
    case = GoldenCase.load(GOLDEN / f"{name}.npz")
    graph = exported("golden", case.variant)
    with graph.engine(own=own) as engine:
        assert replay(case, engine, graph.contract).error <= case.tolerance


# One row only: with more, the released code averages Delta over rows that are not this image's.
@pytest.mark.parametrize(
    "name", mostly_slow(["query-emag-only", "map-emag-only-wide", "map-imgtxt"], "query-emag-only")
)
def test_our_own_choice_of_blocks_is_the_recorded_one(name: str) -> None:
    case = GoldenCase.load(GOLDEN / f"{name}.npz")
    assert case.meta["combo"] == "Only_EMAG"
    fork = golden_fork(case.variant, case.renorm)
    result = replay(case, EagerEngine(fork, fork.contract.graph), fork.contract, select=True)
    guided = case.arrays["apply"].bool()
    chosen = result.selected[guided][:, 0]
    recorded = case.arrays["selected"][guided].float().reshape(chosen.shape)
    torch.testing.assert_close(chosen, recorded, rtol=0, atol=0)
    assert recorded.argmax(dim=1).any(), "all first candidates: that is what an argmax of zeros gives too"
    assert result.error <= case.tolerance


def _run(case_file: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.golden", str(case_file), str(GOLDEN / "mmdit"), *options]
    root = GOLDEN.parent.parent
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_the_command_passes_a_recording_and_fails_a_tampered_one(tmp_path: Path) -> None:
    name = "query-emag-only.npz"
    good = _run(GOLDEN / name, "--engine", "torch")
    assert good.returncode == 0, good.stderr
    assert " ok" in good.stdout

    tampered = Path(shutil.copy(GOLDEN / name, tmp_path))
    with np.load(tampered) as file:
        arrays = dict(file)
    arrays["latents"][20] += 1e-3
    np.savez(tampered, **arrays)
    bad = _run(tampered, "--engine", "torch", "--steps")
    assert bad.returncode == 1, bad.stderr
    assert "FAILED" in bad.stdout
    errors = [float(value) for value in re.findall(r"^step +\d+: (\S+)", bad.stdout, re.MULTILINE)]
    tolerance = GoldenCase.load(tampered).tolerance
    assert [index for index, error in enumerate(errors) if error > tolerance] == [20]
