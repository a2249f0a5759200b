"""Files for people and for other programs: they fit the project, and what reads them."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from emag_export.version import VERSION
from release.project import DEVELOPMENT_EXTRAS, ROOT, pyproject

GITHUB = ROOT / ".github"
FORMS = ("bug.yml", "feature.yml")
SCHEMAS = {
    "vendor.citation-file-format": ["CITATION.cff"],
    "vendor.dependabot": [".github/dependabot.yml"],
    "vendor.github-issue-config": [".github/ISSUE_TEMPLATE/config.yml"],
    "vendor.github-issue-forms": [f".github/ISSUE_TEMPLATE/{name}" for name in FORMS],
}
PAGES = (
    *("CHANGELOG.md", "CITATION.cff", "CODE_OF_CONDUCT.md", "CONTRIBUTING.md", "SECURITY.md"),
    *("docs/first-hour.md", "docs/release.md", "pyproject.toml"),
    *(path.relative_to(ROOT).as_posix() for path in sorted(GITHUB.rglob("*.*")) if path.is_file()),
)


def read_yaml(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / name).read_text("utf-8"))
    return found


@pytest.mark.parametrize("schema", SCHEMAS)
def test_files_have_the_form_that_their_readers_take(schema: str) -> None:
    names = [str(ROOT / name) for name in SCHEMAS[schema]]
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_citation_is_of_this_version_and_of_the_paper() -> None:
    citation, project = read_yaml("CITATION.cff"), pyproject()["project"]
    assert str(citation["version"]) == VERSION
    assert citation["license"] == project["license"]
    assert citation["repository-code"] == project["urls"]["Repository"]
    assert citation["authors"] == project["authors"]
    (paper,) = citation["references"]
    assert paper["url"] == "https://arxiv.org/abs/2512.17303"


def test_addresses_of_the_project_are_those_of_pyproject() -> None:
    """A repository that moves is changed in one place, and this finds the others."""
    urls = pyproject()["project"]["urls"]
    assert {"Homepage", "Documentation", "Repository", "Issues", "Changelog"} == urls.keys()
    repository, site = urls["Repository"], urls["Documentation"]
    found = [
        (page, url)
        for page in PAGES
        for url in re.findall(
            r"https://[^\s)>\"'`]*emag-export[^\s)>\"'`]*", (ROOT / page).read_text("utf-8")
        )
    ]
    assert len(found) > 10
    index = "https://pypi.org/project/emag-export/"
    for page, url in found:
        assert url.startswith((f"{repository}/", site, index)) or url == repository, (page, url)


def test_links_between_files_lead_somewhere() -> None:
    for page in PAGES:
        if page.endswith(".md"):
            for link in re.findall(r"\]\((?!https?:|#)([^)#\s]+)\)", (ROOT / page).read_text("utf-8")):
                assert (ROOT / page).parent.joinpath(link).exists(), (page, link)


@pytest.mark.parametrize("name", FORMS)
def test_a_form_asks_for_what_is_needed(name: str) -> None:
    """GitHub refuses a form without these, one whose ids repeat, and one that asks for nothing."""
    form = read_yaml(f".github/ISSUE_TEMPLATE/{name}")
    assert {"name", "description", "body"} <= form.keys()
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    ids = [field["id"] for field in fields]
    assert len(set(ids)) == len(ids)
    assert any(field.get("validations", {}).get("required") for field in fields)
    if name == "bug.yml":
        asked = {field["id"] for field in fields if field.get("validations", {}).get("required")}
        assert {"command", "error", "doctor"} <= asked
        assert "emag-export doctor --json" in (GITHUB / "ISSUE_TEMPLATE" / name).read_text("utf-8")


def test_no_extra_for_users_brings_a_tool_of_developers() -> None:
    """Every other extra is shipped, and its licences are looked at. The index takes no addresses."""
    extras = pyproject()["project"]["optional-dependencies"]
    asked = {name: [Requirement(line) for line in lines] for name, lines in extras.items()}
    assert not [one for lines in asked.values() for one in lines if one.url is not None]
    tools = {one.name for name in DEVELOPMENT_EXTRAS for one in asked.get(name, ())} - {"emag-export"}
    assert {"pytest", "pre-commit", "twine"} <= tools
    shipped = {one.name for name, lines in asked.items() if name not in DEVELOPMENT_EXTRAS for one in lines}
    assert not shipped & tools


def test_an_editor_sets_what_the_formatter_wants() -> None:
    text = (ROOT / ".editorconfig").read_text("utf-8")
    assert f"max_line_length = {pyproject()['tool']['ruff']['line-length']}" in text
    assert "[Makefile]\nindent_style = tab" in text


def test_folders_of_a_checkout_are_in_no_wheel() -> None:
    packages = pyproject()["tool"]["setuptools"]["packages"]
    assert not {name.split(".")[0] for name in packages} & {"benchmarks", "release", "tests"}
    assert all((ROOT / name / "__init__.py").is_file() for name in ("benchmarks", "release", "tests"))
    assert "release" in pyproject()["tool"]["mypy"]["files"]


def test_what_a_new_contributor_reads_is_linked() -> None:
    contributing = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    for page in ("docs/first-hour.md", "docs/release.md", "CODE_OF_CONDUCT.md", "SECURITY.md"):
        assert f"]({page})" in contributing, page
        assert Path(ROOT, page).is_file()
