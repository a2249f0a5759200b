"""Print what changed in a version: ``python -m release.notes 0.1.0``; the text of a release."""

import sys

from release.project import ROOT, ReleaseError, read_changelog


def notes(version: str) -> str:
    """What changed in a version.

    Raises:
        ReleaseError: If the changelog has no such section.
    """
    for section in read_changelog((ROOT / "CHANGELOG.md").read_text("utf-8")):
        if section.version == version:
            return section.text
    raise ReleaseError(f"CHANGELOG.md has no section of {version}")


if __name__ == "__main__":
    sys.stdout.write(notes(sys.argv[1].removeprefix("v")) + "\n")
