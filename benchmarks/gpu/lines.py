"""Results as lines of JSON: written at once, one after the other, and never rewritten."""

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from emag_export.bench.report import describe_machine

__all__ = ["Identity", "Lines", "key_of", "this_machine"]

Line = Mapping[str, Any]

_RESULTS = "benchmarks/results"
"""What changes there is no change of the code."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What figures are comparable within; part of every line."""

    commit: str | None
    """Of the code, with ``+`` and a hash of what was changed after it; None outside a repository."""
    device: str
    driver: str
    """Empty where there is none."""
    versions: Mapping[str, str]
    """Of Python, CUDA and every package that has a say in speed."""


def this_machine(device: str, commit: str | None = None) -> Identity:
    """The code and the machine as they are now.

    Args:
        device: ``cuda`` or ``cpu``.
        commit: Of the code, where it lies outside its repository.
    """
    machine = describe_machine()
    versions = {**machine["versions"], "python": machine["python"], "cuda": torch.version.cuda or ""}
    on_gpu = device.startswith("cuda")
    return Identity(
        commit=commit or _commit(),
        device=torch.cuda.get_device_name(device) if on_gpu else machine["processor"],
        driver=_said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else "",
        versions=versions,
    )


def _commit() -> str | None:
    changes = _said("git", "diff", "HEAD", "--", ".", f":!{_RESULTS}")
    changed = f"+{hashlib.sha256(changes.encode()).hexdigest()[:8]}" if changes else ""
    return _said("git", "rev-parse", "HEAD") + changed or None


def _said(*command: str) -> str:
    """Standard output of a program; empty where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def key_of(axes: Mapping[str, Any]) -> str:
    """What a line is about, for looking it up."""
    return json.dumps(axes, sort_keys=True)


class Lines:
    """The file of lines, of any code and machine; only those of ``identity`` are looked at.

    A line that was cut off when something died is passed over, and what it was about is measured again.

    Args:
        path: Need not exist.
        identity: Of this run.
    """

    def __init__(self, path: Path, identity: Identity) -> None:
        self.path = path
        self.identity = identity
        path.parent.mkdir(parents=True, exist_ok=True)

    def append(self, line: Line) -> None:
        """Write a line, with everything that identifies it, and see it to the disk."""
        text = json.dumps({**line, **asdict(self.identity)})
        with self.path.open("ab+") as file:
            if file.tell() and not self._ends_well(file.tell()):
                file.write(b"\n")
            file.write(text.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _ends_well(self, size: int) -> bool:
        with self.path.open("rb") as file:
            file.seek(size - 1)
            return file.read() == b"\n"

    def latest(self) -> dict[str, Line]:
        """Key to the last line about it, in the order of their first appearance."""
        mine = asdict(self.identity)
        found: dict[str, Line] = {}
        for line in self._all():
            if all(line.get(name) == value for name, value in mine.items()):
                found[key_of(line["axes"])] = line
        return found

    def _all(self) -> Iterable[Line]:
        if not self.path.is_file():
            return
        for text in self.path.read_text("utf-8", errors="replace").splitlines():
            try:
                yield json.loads(text)
            except json.JSONDecodeError:
                continue
