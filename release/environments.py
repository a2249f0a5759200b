"""A clean environment with the wheel, for each Python that is found."""

import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from release.artefacts import metadata_of, run
from release.project import ROOT

__all__ = ["CONSTRAINTS", "Environment", "find_python", "make_environment"]

CONSTRAINTS = ROOT / "constraints.txt"
_HIDDEN = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
_PROBE = "import ensurepip, sys, venv; print('%d.%d' % sys.version_info[:2])"


@dataclass(frozen=True, kw_only=True)
class Environment:
    """A virtual environment, and nothing of the environment that we run in."""

    folder: Path

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    @property
    def packages(self) -> Path:
        """Where its packages lie."""
        return next(self.folder.glob("lib/python*/site-packages"))

    def run(self, *arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
        """Run ``emag-export`` as installed there; an error of it is the caller's to read."""
        variables = {name: value for name, value in os.environ.items() if name not in _HIDDEN}
        command = [str(self.folder / "bin" / "emag-export"), *map(str, arguments)]
        environment = {**variables, "COLUMNS": "240"}
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def find_python(version: str) -> Path | None:
    """An interpreter of a version, such as ``3.11``, that can make environments.

    Ours if it is one, else what ``PATH`` has. A name on ``PATH`` that does not start, as those of a version
    manager may be, is none.
    """
    if sys.version.startswith(f"{version}."):
        return Path(sys.executable)
    found = shutil.which(f"python{version}")
    if found is None:
        return None
    done = subprocess.run((found, "-c", _PROBE), capture_output=True, text=True, check=False)
    return Path(found) if done.returncode == 0 and done.stdout.strip() == version else None


def make_environment(python: Path, folder: Path, wheel: Path, extras: tuple[str, ...]) -> Environment:
    """Install a wheel and what it asks for, at the versions of ``constraints.txt``.

    An environment that is there is used again if it was finished with the same requirements and constraints:
    then only the wheel itself is installed.

    Args:
        python: Interpreter of the environment.
        folder: Of the environment.
        wheel: What is installed, always the very file.
        extras: Of the wheel.

    Raises:
        ReleaseError: If something cannot be installed, or what is installed does not fit together.
    """
    environment, stamp = Environment(folder=folder), folder / "installed.sha256"
    pip = (environment.python, "-I", "-m", "pip", "--disable-pip-version-check")
    asked = _requirements(python, wheel, extras)
    if not (stamp.exists() and stamp.read_text("utf-8") == asked):
        run(python, "-m", "venv", "--clear", folder)
        # The one that Python brings may be too old to tell licence expressions.
        run(*pip, "install", "--quiet", "--upgrade", "pip")
        wanted = f"{wheel}[{','.join(extras)}]"
        run(*pip, "install", "--quiet", "-c", CONSTRAINTS, wanted)
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", "--force-reinstall", wheel)
    run(*pip, "check")
    stamp.write_text(asked, "utf-8")
    return environment


def _requirements(python: Path, wheel: Path, extras: tuple[str, ...]) -> str:
    """A digest of everything that decides what is installed beside the wheel, this file included."""
    lines = metadata_of(wheel).get_all("Requires-Dist") or []
    texts = [path.read_text("utf-8") for path in (CONSTRAINTS, Path(__file__))]
    parts = [str(python), *extras, *lines, *texts]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
