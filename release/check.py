"""Everything that must hold before a release: ``python -m release.check`` (``make release-check``).

Builds the sdist and the wheel of the commit that is checked out, looks at every file in them, installs the
wheel into a clean environment of every supported Python on PATH, runs the demonstration there, and writes
``out/release/licences.md``. What is uploaded lies in ``out/release/dist``. An environment that is there is
used again. The first thing that does not hold ends it with exit code 1.
"""

import argparse
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from emag_export.version import VERSION
from release.artefacts import (
    Artefacts,
    build_artefacts,
    build_wheel,
    check_same,
    check_sdist,
    check_wheel,
    run,
    sdist_files,
    wheel_files,
)
from release.demonstration import demonstrate
from release.environments import Environment, find_python, make_environment
from release.licences import UNLISTED_EXTRAS, check_licences, installed, licence_table, optional
from release.project import (
    DEVELOPMENT_EXTRAS,
    ROOT,
    ReleaseError,
    check_version,
    pyproject,
    read_changelog,
    supported_pythons,
)
from release.sources import changed_files, copy_sources, wheel_names

EXTRAS = ("cpu", "export", "report")
"""What the demonstration needs."""
_RELATIVE = re.compile(
    r"\]\((?!https?:|#)([^)\s]+)\)"  # links and images of Markdown
    r"|^\[[^\]]+\]: (?!https?:)(\S+)"  # what a link with a name leads to
    r"|(?:src|srcset|href)=\"(?!https?:|#)([^\"]+)\"",  # the same in HTML
    re.MULTILINE,
)

console = Console(highlight=False, soft_wrap=True)


@contextmanager
def step(name: str, *, forgiving: bool = False) -> Iterator[Callable[[str], None]]:
    """Show that something is being done, then what came of it, which the body says, and how long it took.

    With ``forgiving`` an error is shown and forgotten.
    """
    begin, said = time.monotonic(), list[str]()
    try:
        with console.status(f"{name} …"):
            yield said.append
    except ReleaseError as error:
        console.print("[yellow]![/]" if forgiving else "[red]✗[/]", f"{name}:", escape(str(error)))
        if forgiving:
            return
        raise
    console.print(f"[green]✓[/] {name}: {said[0]} [dim]({time.monotonic() - begin:.0f} s)[/]")


def check_tree() -> str:
    """The artefacts are made of a commit."""
    changed = changed_files()
    if changed:
        raise ReleaseError(
            f"{len(changed)} files differ from the commit: {', '.join(changed[:10])}; commit or stash them"
        )
    return "as committed"


def check_changelog(tag: str | None) -> str:
    """Version, changelog and tag say the same."""
    section = check_version(read_changelog((ROOT / "CHANGELOG.md").read_text("utf-8")), VERSION, tag)
    return f"{VERSION}, {section.date}"


def relative_targets(text: str) -> list[str]:
    """Links and images of a page that need the repository around it."""
    return ["".join(match) for match in _RELATIVE.findall(text)]


def check_readme() -> str:
    """The index shows the README, and has none of the files that it links to."""
    found = relative_targets((ROOT / "README.md").read_text("utf-8"))
    if found:
        repository = pyproject()["project"]["urls"]["Repository"]
        raise ReleaseError(
            f"README.md has {len(found)} links that lead nowhere outside the repository, the first to "
            f"{found[0]}; write them whole, as in {repository}/blob/main/{found[0]}"
        )
    return "links to whole addresses"


def build(dist: Path) -> Artefacts:
    """The sdist and the wheel; the wheel that somebody else would build of the sdist must be the same."""
    shutil.rmtree(dist, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="emag-export-") as name:
        copy_sources(Path(name) / "source")
        artefacts = build_artefacts(Path(name) / "source", dist)
        again = build_wheel(artefacts.sdist, Path(name) / "again")
        check_same(wheel_files(artefacts.wheel), wheel_files(again))
    run(sys.executable, "-m", "twine", "check", "--strict", artefacts.sdist, artefacts.wheel)
    return artefacts


def check_files(artefacts: Artefacts, listed: Path) -> str:
    """Every file of the packages is shipped, and no other; writes the list of all of them."""
    packaged, wheel, sdist = wheel_names(), wheel_files(artefacts.wheel), sdist_files(artefacts.sdist)
    lines = [*(f"wheel {name}" for name in sorted(wheel)), *(f"sdist {name}" for name in sorted(sdist))]
    listed.write_text("\n".join([*lines, ""]), "utf-8")
    check_wheel(wheel, packaged)
    check_sdist(sdist, packaged)
    return f"{len(wheel)} in the wheel, {len(sdist)} in the sdist: {listed}"


def check_all_licences(environment: Environment, wheel: Path, page: Path) -> str:
    """Everything that is shipped or asked for may be used; writes the table of licences."""
    project = pyproject()["project"]
    known = {*EXTRAS, *DEVELOPMENT_EXTRAS, *UNLISTED_EXTRAS}
    required = installed(environment, project["name"])
    extra = optional(environment, wheel, sorted({*project["optional-dependencies"]} - known))
    names = wheel_files(wheel)
    page.write_text(licence_table(VERSION, required, extra, names), "utf-8")
    check_licences([*required, *extra], names)
    return f"{len(required)} packages, {len(extra)} more in other extras: {page}"


def install_everywhere(folder: Path, wheel: Path) -> dict[str, Environment]:
    """A clean environment for every supported Python that is found.

    Raises:
        ReleaseError: If none is, or the wheel cannot be installed.
    """
    environments = {}
    for version in supported_pythons():
        with step(f"install, Python {version}") as say:
            python = find_python(version)
            if python is None:
                say("[yellow]not tried: no such Python on PATH[/]")
                continue
            place = folder / f"python{version}"
            environments[version] = make_environment(python, place, wheel, EXTRAS)
            say(f"{place}, with {', '.join(EXTRAS)}")
    if not environments:
        raise ReleaseError(f"no Python of {', '.join(supported_pythons())} is on PATH: install one")
    return environments


def check_release(folder: Path, *, tag: str | None, trial: bool) -> str:
    """Take every step.

    Args:
        folder: Everything is written here.
        tag: Of the release, if there is one.
        trial: A clean tree, a changelog and a README for the index, which a release needs, may be missing.

    Returns:
        What holds, in one line.

    Raises:
        ReleaseError: At the first step that fails.
    """
    with step("git", forgiving=trial) as say:
        say(check_tree())
    with step("version", forgiving=trial) as say:
        say(check_changelog(tag))
    with step("README", forgiving=trial) as say:
        say(check_readme())
    with step("build") as say:
        artefacts = build(folder / "dist")
        paths = (artefacts.sdist, artefacts.wheel)
        say(", ".join(f"{path.name} {path.stat().st_size / 1e6:.1f} MB" for path in paths))
    with step("files") as say:
        say(check_files(artefacts, folder / "files.txt"))
    environments = install_everywhere(folder, artefacts.wheel)
    with step("licences") as say:
        some = next(iter(environments.values()))
        say(check_all_licences(some, artefacts.wheel, folder / "licences.md"))
    for version, environment in environments.items():
        with step(f"demo, Python {version}") as say:
            say(f"{demonstrate(environment)} pictures show their prompts")
    untried = [version for version in supported_pythons() if version not in environments]
    verdict = "The trial passed" if trial else "Fit for release"
    return f"{verdict}: {folder / 'dist'}" + (f"; not tried: Python {', '.join(untried)}" if untried else "")


def main() -> int:
    """Check, and say where it stopped."""
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m release.check", description=about)
    parser.add_argument("--tag", help="what is released; its section in the changelog then needs a date")
    parser.add_argument(
        "--trial",
        action="store_true",
        help="a clean tree, a changelog and a README for the index may be missing",
    )
    parser.add_argument("--output", type=Path, default=ROOT / "out" / "release", help="default: out/release")
    arguments = parser.parse_args()
    folder = arguments.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        console.print(check_release(folder, tag=arguments.tag, trial=arguments.trial))
    except ReleaseError:
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
