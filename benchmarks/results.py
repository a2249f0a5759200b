"""Results on the disk: every file says which commit measured what on which machine, and what was varied."""

import json
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emag_export.bench.report import describe_machine

__all__ = ["FOLDER", "commit", "load_results", "processor_slug", "write_results"]

FOLDER = Path("benchmarks/results")
"""From the root of the repository, where benchmarks are run."""


def commit() -> str:
    """The commit that is checked out; whether code differs from it; ``unknown`` outside a repository."""
    try:
        head = _git("rev-parse", "HEAD").strip()
        changed = _git("status", "--porcelain", "--", "*.py").strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head} with uncommitted changes" if changed else head


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], capture_output=True, text=True, check=True).stdout


def processor_slug(machine: Mapping[str, Any]) -> str:
    """The processor's name, fit for a file: ``amd-epyc``."""
    return re.sub(r"[^a-z0-9]+", "-", str(machine["processor"]).lower()).strip("-")


def write_results(path: Path, *, command: str, axes: Mapping[str, Any], **data: Any) -> None:
    """Write a results file whole, beside what decides its numbers.

    Args:
        path: JSON.
        command: That measures this again.
        axes: What was varied, and over which values.
        data: The results.
    """
    machine = {**describe_machine(), "command": command}
    found = {"commit": commit(), "machine": machine, "axes": dict(axes), **data}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", "utf-8")
    partial.replace(path)


def load_results(path: Path) -> dict[str, Any]:
    """What :func:`write_results` wrote."""
    return dict(json.loads(path.read_text("utf-8")))
