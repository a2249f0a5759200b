"""What goes into the artefacts: files that git knows, copied so that nothing is left in the checkout."""

import shutil
import subprocess
from pathlib import Path

from release.project import ROOT, ReleaseError, shipped_folders

__all__ = ["FILES", "changed_files", "copy_sources", "wheel_names"]

FILES = ("CHANGELOG.md", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml")
"""Beside the packages."""


def _git(command: str, *words: str) -> list[str]:
    """Paths that a command of git names, from the root of the checkout.

    Raises:
        ReleaseError: Outside a checkout.
    """
    try:
        done = subprocess.run(
            ("git", command, "-z", *words), cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise ReleaseError(f"git says no files of {ROOT} ({error}): run this in a checkout") from error
    return [path for path in done.stdout.split("\0") if path]


def changed_files() -> list[str]:
    """What differs from the commit that is checked out, untracked files too, as ``git status`` says it."""
    return [line.strip() for line in _git("status", "--porcelain")]


def _known_files() -> list[str]:
    """Files of the packages; those that were just written and are not ignored count."""
    names = _git("ls-files", "--cached", "--others", "--exclude-standard", "--", *shipped_folders(), *FILES)
    return [name for name in names if (ROOT / name).exists()]


def copy_sources(folder: Path) -> None:
    """Copy what an sdist is made of: the packages, their links and data, and the files beside them."""
    for name in _known_files():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target, follow_symlinks=False)


def wheel_names() -> dict[str, str]:
    """Every file of the packages, and its name in the wheel; links between folders are none of them."""
    homes = shipped_folders()
    names = {}
    for name in _known_files():
        top, _, rest = name.partition("/")
        if top in homes and not (ROOT / name).is_symlink():
            names[name] = f"{homes[top]}/{rest}"
    return names
