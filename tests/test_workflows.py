"""What runs on GitHub: valid, with few rights, and about the same targets and versions as everything else."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from release.project import ROOT, pyproject, supported_pythons

WORKFLOWS = ROOT / ".github" / "workflows"
NAMES = sorted(path.name for path in WORKFLOWS.glob("*.yml"))
ACTIONLINT = shutil.which("actionlint") or shutil.which("actionlint", path=str(Path(sys.executable).parent))
WRITING = {
    ("pages.yml", "deploy"): {"pages": "write", "id-token": "write"},
    ("release.yml", "attest"): {"attestations": "write", "id-token": "write"},
    ("release.yml", "publish"): {"id-token": "write"},
    ("release.yml", "github"): {"contents": "write"},
}
"""Jobs that may write, and what. None of them checks code out, so none runs code of this repository."""


def workflow(name: str) -> dict[str, Any]:
    """Its data; YAML 1.1 reads the key ``on`` as true."""
    read: dict[Any, Any] = yaml.safe_load((WORKFLOWS / name).read_text("utf-8"))
    return {str(key): value for key, value in read.items()}


JOBS = [(name, job) for name in NAMES for job in workflow(name)["jobs"]]


def steps(name: str, job: str) -> list[dict[str, Any]]:
    """None of a job that calls another workflow."""
    found: list[dict[str, Any]] = workflow(name)["jobs"][job].get("steps", [])
    return found


def test_all_workflows_are_here() -> None:
    assert NAMES == ["ci.yml", "pages.yml", "release.yml"]


def test_workflows_have_the_form_that_github_takes() -> None:
    """By the schema of workflows, and by that of time limits: a hanging job must not run for six hours."""
    for schema in ("vendor.github-workflows", "custom.github-workflows-require-timeout"):
        command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema]
        done = subprocess.run(
            [*command, *(str(WORKFLOWS / name) for name in NAMES)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout


@pytest.mark.skipif(ACTIONLINT is None, reason="actionlint is not installed: make workflows")
def test_actionlint_finds_nothing() -> None:
    command = [str(ACTIONLINT), *(str(WORKFLOWS / name) for name in NAMES)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_claimed_to_have_run(name: str) -> None:
    """Take this test and these lines out together, once they have."""
    first = (WORKFLOWS / name).read_text("utf-8").partition("\n")[0]
    assert first.startswith("# This workflow has not run yet")


@pytest.mark.parametrize("name", NAMES)
def test_a_workflow_reads_and_only_some_jobs_write(name: str) -> None:
    data = workflow(name)
    assert data["permissions"] == {"contents": "read"}
    assert data["concurrency"]["group"]
    for job, facts in data["jobs"].items():
        assert facts.get("permissions", {}) == WRITING.get((name, job), {}), job


@pytest.mark.parametrize(("name", "job"), WRITING)
def test_what_may_write_runs_no_code_of_this_repository(name: str, job: str) -> None:
    commands = [step.get("run", "") for step in steps(name, job)]
    assert not [step for step in steps(name, job) if "checkout" in step.get("uses", "")]
    assert all(command.startswith("gh release create") for command in commands if command)


@pytest.mark.parametrize(("name", "job"), JOBS)
def test_actions_are_pinned_to_a_major_version_and_leave_no_credentials(name: str, job: str) -> None:
    for step in steps(name, job):
        if "uses" in step:
            action, _, version = step["uses"].partition("@")
            assert re.fullmatch(r"v\d+|release/v\d+", version), step["uses"]
            if action == "actions/checkout":
                assert step["with"]["persist-credentials"] is False


@pytest.mark.parametrize(("name", "job"), JOBS)
def test_what_installs_packages_takes_torch_for_cpus_and_keeps_downloads(name: str, job: str) -> None:
    """A job that runs ``make`` installs; its cache is named after what decides the versions."""
    if not any("make " in step.get("run", "") for step in steps(name, job)):
        return
    environment = {**workflow(name).get("env", {}), **workflow(name)["jobs"][job].get("env", {})}
    dockerfile = (ROOT / "deploy" / "docker" / "Dockerfile.cpu").read_text("utf-8")
    (index,) = re.findall(r"^ARG TORCH_INDEX=(\S+)$", dockerfile, re.MULTILINE)
    assert environment["PIP_EXTRA_INDEX_URL"] == index
    (python,) = (step["with"] for step in steps(name, job) if "setup-python" in step.get("uses", ""))
    assert python["cache"] == "pip"
    assert python["cache-dependency-path"].split() == ["constraints.txt", "pyproject.toml"]


def test_every_make_target_exists() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    commands = [step.get("run", "") for name, job in JOBS for step in steps(name, job)]
    hooks = [hook["entry"] for repo in pre_commit()["repos"] for hook in repo["hooks"]]
    named = re.findall(r"\bmake (?:--\S+ )*([a-z-]+)", "\n".join([*commands, *hooks]))
    assert {"lint", "test-suite", "release-check", "typecheck"} <= set(named)
    for target in named:
        assert f"\n{target}:" in makefile, target


def test_tests_run_on_every_python_that_is_supported() -> None:
    assert tuple(workflow("ci.yml")["jobs"]["tests"]["strategy"]["matrix"]["python"]) == supported_pythons()
    (setup,) = (step for step in steps("release.yml", "check") if "setup-python" in step.get("uses", ""))
    listed = setup["with"]["python-version"].split()
    assert sorted(listed, key=lambda version: int(version[2:])) == list(supported_pythons())
    pinned = (ROOT / "constraints.txt").read_text("utf-8").partition("\n")[0]
    assert f"Python {listed[-1]}," in pinned, "the last one is the Python that make takes"


def pre_commit() -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))
    return read


def test_hooks_run_the_pinned_ruff_and_mypy() -> None:
    """No hook brings a version of its own: each runs what ``make`` installed with ``constraints.txt``."""
    assert [repo["repo"] for repo in pre_commit()["repos"]] == ["local"]
    entries = {hook["id"]: hook["entry"].split()[0] for hook in pre_commit()["repos"][0]["hooks"]}
    assert entries == {"ruff-format": ".venv/bin/ruff", "ruff-check": ".venv/bin/ruff", "mypy": "make"}
    makefile = (ROOT / "Makefile").read_text("utf-8")
    assert "\ntypecheck: $(STAMP)" in makefile
    pins = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    for name in ("ruff", "mypy"):
        asked = [
            line for line in pyproject()["project"]["optional-dependencies"]["test"] if line.startswith(name)
        ]
        assert len(asked) == 1
        assert sum(pin.startswith(f"{name}==") for pin in pins) == 1
