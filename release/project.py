"""What the project says of itself: its version, its Pythons, what it ships, and its changelog."""

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "DEVELOPMENT_EXTRAS",
    "ROOT",
    "ReleaseError",
    "Section",
    "check_version",
    "pyproject",
    "read_changelog",
    "shipped_folders",
    "supported_pythons",
]

ROOT = Path(__file__).parent.parent
UNRELEASED = "Unreleased"
DEVELOPMENT_EXTRAS = ("actionlint", "dev", "docs", "release", "test")
"""Extras that only work in a checkout."""

_HEADING = re.compile(r"^## \[(?P<version>[^\]]+)\](?: - (?P<date>.+))?$", re.MULTILINE)
_LINK = re.compile(r"^\[[^\]]+\]: .*\n?", re.MULTILINE)
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")


class ReleaseError(Exception):
    """Something that must be put right before a release; the message says what and how."""


def pyproject() -> dict[str, Any]:
    """All of ``pyproject.toml``."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def supported_pythons() -> tuple[str, ...]:
    """Versions that the classifiers name, such as ``3.11``, oldest first."""
    named = "Programming Language :: Python :: 3."
    found = [line for line in pyproject()["project"]["classifiers"] if line.startswith(named)]
    return tuple(sorted((line.rpartition(" ")[2] for line in found), key=lambda text: int(text[2:])))


def shipped_folders() -> dict[str, str]:
    """Folders of the checkout that are packages, and the folder of each in the wheel."""
    tool = pyproject()["tool"]["setuptools"]
    homes = {folder: package.replace(".", "/") for package, folder in tool["package-dir"].items()}
    top = {package.split(".")[0] for package in tool["packages"]}
    return {**{name: name for name in sorted(top)}, **homes}


@dataclass(frozen=True, kw_only=True)
class Section:
    """One version in the changelog.

    Attributes:
        version: Or ``Unreleased``.
        date: What stands behind the version, an ISO date once it is released.
        text: Everything below the heading, without links to versions.
    """

    version: str
    date: str | None
    text: str

    @property
    def released(self) -> bool:
        """Whether it has a date."""
        return self.date is not None and _DATE.fullmatch(self.date) is not None


def read_changelog(text: str) -> tuple[Section, ...]:
    """Sections of a changelog in the format of Keep a Changelog, newest first."""
    headings = list(_HEADING.finditer(text))
    ends = [*(heading.start() for heading in headings[1:]), len(text)]
    return tuple(
        Section(
            version=heading["version"],
            date=heading["date"],
            text=_LINK.sub("", text[heading.end() : end]).strip(),
        )
        for heading, end in zip(headings, ends, strict=True)
    )


def check_version(sections: tuple[Section, ...], version: str, tag: str | None = None) -> Section:
    """Find the section of a version, which must be the newest, with nothing above it.

    Args:
        sections: Of the changelog.
        version: Of the package.
        tag: Of the commit that is released, if there is one: then the section needs a date.

    Returns:
        The section.

    Raises:
        ReleaseError: If version, tag and changelog do not say the same.
    """
    if tag is not None and tag != f"v{version}":
        raise ReleaseError(f"the tag is {tag}, the version {version}: the tag must be v{version}")
    if len(sections) < 2 or sections[0].version != UNRELEASED:
        raise ReleaseError(
            f"CHANGELOG.md must begin with [{UNRELEASED}] and the section of {version} below it"
        )
    unreleased, newest = sections[:2]
    if unreleased.text:
        raise ReleaseError(
            f"CHANGELOG.md has lines below [{UNRELEASED}]: move them into a section of the new version, and "
            f"set that version (now {version}) in emag_export/version.py"
        )
    if newest.version != version:
        raise ReleaseError(
            f"the newest section of CHANGELOG.md is {newest.version}, emag_export/version.py says {version}"
        )
    if tag is not None and not newest.released:
        raise ReleaseError(
            f"CHANGELOG.md dates {version} {newest.date!r}: write the day of the release, as in "
            f"## [{version}] - 2000-12-31"
        )
    return newest
