"""Print what changed in a version: ``python -m release.notes 0.1.0``; the text of a release."""

import re
import sys

from release.project import ROOT, ReleaseError, pyproject, read_changelog

_RELATIVE = re.compile(r"\]\((?!https?:|#)([^)\s]+)\)")


def notes(version: str) -> str:
    """What changed in a version, with whole links: the page of a release has no files beside it.

    Raises:
        ReleaseError: If the changelog has no such section.
    """
    for section in read_changelog((ROOT / "CHANGELOG.md").read_text("utf-8")):
        if section.version == version:
            files = f"{pyproject()['project']['urls']['Repository']}/blob/v{version}"
            return _RELATIVE.sub(rf"]({files}/\1)", section.text)
    raise ReleaseError(f"CHANGELOG.md has no section of {version}")


if __name__ == "__main__":
    sys.stdout.write(notes(sys.argv[1].removeprefix("v")) + "\n")
