"""What the documentation site does beyond mkdocs; ``make docs`` builds it whole."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from mkdocs.exceptions import PluginError

import emag_export
from release.project import DEVELOPMENT_EXTRAS, pyproject
from website.hooks import on_page_markdown, undocumented
from website.roles import linked

ROOT = Path(__file__).parent.parent


def page(tmp_path: Path, markdown: str) -> str:
    """Of a page in ``docs/guides`` of a repository that has ``engines/`` and ``LICENSE``."""
    (tmp_path / "docs" / "guides").mkdir(parents=True)
    (tmp_path / "docs" / "faq.md").touch()
    (tmp_path / "engines").mkdir()
    (tmp_path / "LICENSE").touch()
    config: Any = SimpleNamespace(docs_dir=str(tmp_path / "docs"), repo_url="https://example.org/a/b/")
    source: Any = SimpleNamespace(file=SimpleNamespace(src_uri="guides/x.md"))
    return on_page_markdown(markdown, page=source, config=config)


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("[e](../../engines)", "[e](<https://example.org/a/b/tree/main/engines>)"),
        ("[l](../../LICENSE#a)", "[l](<https://example.org/a/b/blob/main/LICENSE#a>)"),
        ("[f](../faq.md#b)", "[f](../faq.md#b)"),
        ("[g](#here) [h](https://x.org/y)", "[g](#here) [h](https://x.org/y)"),
        (
            "![a](../images/f-light.svg)",
            "![a](../images/f-light.svg#only-light)![a](../images/f-dark.svg#only-dark)",
        ),
        ("![a](../images/f.png)", "![a](../images/f.png)"),
    ],
)
def test_links_out_of_the_documents_lead_to_the_repository(written: str, shown: str, tmp_path: Path) -> None:
    assert page(tmp_path, written) == shown


def test_a_link_to_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match="there is no runtime; mend the link"):
        page(tmp_path, "[r](../../runtime)")


def test_a_public_name_that_no_page_has_is_found() -> None:
    front = {f"emag_export.{name}" for name in emag_export.__all__}
    assert undocumented("", front) == []
    assert undocumented("", front - {"emag_export.build"}) == ["emag_export.build"]
    missing = undocumented("::: emag_export.kinds\n::: emag_export.kinds.KINDS", front)
    assert "emag_export.kinds.Variant" in missing
    assert all(name.startswith("emag_export.kinds.") for name in missing)


@pytest.mark.parametrize(
    ("role", "link"),
    [
        (":class:`~a.b.C`", '<autoref identifier="a.b.C" optional><code>C</code></autoref>'),
        (":func:`run`", '<autoref identifier="home.run" optional><code>run</code></autoref>'),
        (":math:`p + s`", "`p + s`"),
        ("``code``", "``code``"),
    ],
)
def test_roles_of_docstrings_become_links(role: str, link: str) -> None:
    assert linked(f"See {role}.", "home") == f"See {link}."


def test_every_page_is_in_the_navigation() -> None:
    def pages(entry: Any) -> set[str]:
        if isinstance(entry, str):
            return {entry}
        return set().union(*map(pages, entry.values() if isinstance(entry, dict) else entry))

    found = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))
    there = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert pages(found["nav"]) == there


def test_the_start_page_lists_every_extra_that_users_install() -> None:
    text = (ROOT / "docs" / "index.md").read_text("utf-8")
    (body,) = re.findall(r"^\| extra \|.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    listed = [name for line in body.splitlines() for name in re.findall(r"`([\w-]+)`", line.split("|")[1])]
    assert sorted(listed) == sorted(
        pyproject()["project"]["optional-dependencies"].keys() - {*DEVELOPMENT_EXTRAS}
    )
