"""Build the sdist and the wheel, and judge what is in them."""

import base64
import csv
import hashlib
import io
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from email.message import Message
from email.parser import HeaderParser
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement

from release.project import ReleaseError, pyproject
from release.sources import FILES

__all__ = [
    "Artefacts",
    "build_artefacts",
    "build_wheel",
    "check_same",
    "check_sdist",
    "check_wheel",
    "metadata_of",
    "run",
    "sdist_files",
    "wheel_files",
]

REQUIRED = (
    "emag_export/py.typed",
    "emag_export/tiny_sd3/model/README.md",
    "emag_export/tiny_dit/model/README.md",
)
"""Of the wheel, whatever git says: the mark of a typed package and both model cards."""
UNWANTED = ("__pycache__", "benchmarks", "build", "docs", "examples", "out", "release", "results", "tests")
"""Folders of which nothing is shipped, wherever they lie."""
UNWANTED_SUFFIXES = (".engine", ".onnx", ".plan", ".pyc", ".pyo", ".npz", ".pt")
"""What runs leave behind, and what tests compare with."""


@dataclass(frozen=True, kw_only=True)
class Artefacts:
    """What is uploaded."""

    sdist: Path
    wheel: Path


def run(*words: str | Path, cwd: Path | None = None) -> str:
    """Run a command to its end.

    Returns:
        What it printed.

    Raises:
        ReleaseError: If it fails; with the last lines that it printed.
    """
    command = [str(word) for word in words]
    done = subprocess.run(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        last = "\n".join(done.stdout.splitlines()[-20:])
        raise ReleaseError(f"{' '.join(command)} ended with {done.returncode}:\n{last}")
    return done.stdout


def _backend_is_here() -> bool:
    """Whether this environment has what ``[build-system]`` asks for, so that none must be made for it."""
    for text in pyproject()["build-system"]["requires"]:
        requirement = Requirement(text)
        try:
            if not requirement.specifier.contains(version(requirement.name), prereleases=True):
                return False
        except PackageNotFoundError:
            return False
    return True


def build_artefacts(source: Path, folder: Path) -> Artefacts:
    """Build the sdist, and the wheel from the same tree.

    Without isolation where this environment has the build backend: the pinned one, and no network. With it
    otherwise: ``build`` then downloads what ``[build-system]`` asks for.

    Args:
        source: What :func:`release.sources.copy_sources` wrote.
        folder: For both; must not hold others.
    """
    isolation = ("--no-isolation",) if _backend_is_here() else ()
    run(sys.executable, "-m", "build", "--sdist", "--wheel", *isolation, "--outdir", folder, source)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return Artefacts(sdist=sdist, wheel=wheel)


def build_wheel(source: Path, folder: Path) -> Path:
    """Build a wheel as ``pip`` does, of a folder or an sdist; isolated as in :func:`build_artefacts`."""
    isolation = ("--no-build-isolation", "--no-index") if _backend_is_here() else ()
    run(sys.executable, "-m", "pip", "--quiet", "wheel", "--no-deps", *isolation, "-w", folder, source)
    (wheel,) = folder.glob("*.whl")
    return wheel


def wheel_files(wheel: Path) -> dict[str, str]:
    """Names in a wheel with their SHA-256, computed here and compared with the wheel's own record.

    Raises:
        ReleaseError: If the record does not match the files.
    """
    with zipfile.ZipFile(wheel) as archive:
        found = {
            name: base64.urlsafe_b64encode(hashlib.sha256(archive.read(name)).digest()).rstrip(b"=").decode()
            for name in archive.namelist()
        }
        (record,) = (name for name in found if name.endswith(".dist-info/RECORD"))
        rows = list(csv.reader(io.StringIO(archive.read(record).decode())))
    del found[record]
    recorded = {name: digest.removeprefix("sha256=") for name, digest, _ in rows if name != record}
    if recorded != found:
        raise ReleaseError(f"{wheel.name}: {record} does not describe the files; build it again")
    return found


def sdist_files(sdist: Path) -> set[str]:
    """Names in an sdist, without the folder that holds all of them."""
    with tarfile.open(sdist) as archive:
        return {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}


def metadata_of(wheel: Path) -> Message:
    """The wheel's ``METADATA``."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return HeaderParser().parsestr(archive.read(name).decode())


def unwanted(names: Iterable[str]) -> list[str]:
    """Names that must not be shipped."""
    return sorted(
        name
        for name in names
        if set(name.split("/")[:-1]) & set(UNWANTED)
        or name.endswith(UNWANTED_SUFFIXES)
        or name.rpartition("/")[2].startswith(("test_", "conftest", ".git", ".DS_Store"))
    )


def _compare(where: str, found: set[str], wanted: set[str]) -> None:
    """Raise unless a set of names is what it should be."""
    surplus, lacking = sorted(found - wanted), sorted(wanted - found)
    problems = [
        f"{label}: {', '.join(names)}"
        for label, names in (
            ("never shipped", unwanted(found)),
            ("from no package of the checkout", surplus),
            ("missing", lacking),
        )
        if names
    ]
    if problems:
        raise ReleaseError(
            f"files of {where}: {'; '.join(problems)}. pyproject.toml lists packages and their data, "
            "MANIFEST.in what else an sdist takes or leaves out"
        )


def check_wheel(names: Iterable[str], packaged: Mapping[str, str]) -> None:
    """A wheel holds every file of the packages, its own metadata with the licence, and nothing else.

    Args:
        names: Of its files.
        packaged: What :func:`release.sources.wheel_names` found.

    Raises:
        ReleaseError: If something is lacking or too much.
    """
    found = set(names)
    own = {name for name in found if name.split("/")[0].endswith(".dist-info")}
    licences = {name for name in own if name.endswith(".dist-info/licenses/LICENSE")}
    if not licences:
        raise ReleaseError("the wheel holds no LICENSE: license-files in pyproject.toml must name it")
    _compare("the wheel", found - own, {*packaged.values(), *REQUIRED})


def check_sdist(names: Iterable[str], packaged: Mapping[str, str]) -> None:
    """An sdist holds the files that a wheel is built of, and nothing else but what setuptools adds.

    Raises:
        ReleaseError: If something is lacking or too much.
    """
    added = {name for name in names if name in ("PKG-INFO", "setup.cfg") or ".egg-info/" in name}
    _compare("the sdist", set(names) - added, {*packaged, *FILES})


def check_same(first: Mapping[str, str], second: Mapping[str, str]) -> None:
    """Two wheels hold the same files, byte for byte.

    Raises:
        ReleaseError: With the names that differ.
    """
    differ = sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))
    if differ:
        raise ReleaseError(
            f"the wheel of the sdist differs from that of the checkout: {', '.join(differ)}; what only the "
            "checkout has must be named in pyproject.toml or MANIFEST.in"
        )
