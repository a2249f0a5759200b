"""What mkdocs does not do by itself: links into the repository, figures for two backgrounds, public names.

The pages are written to be read in the repository as well, so they link to code and results by relative
paths. On the site these become links to the repository.
"""

import importlib
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.pages import Page
from mkdocstrings import Inventory

__all__ = ["on_page_markdown", "on_post_build", "undocumented"]

_LINK = re.compile(r"(?<!!)(\]\()(?!#|[a-z]+:)([^)#\s]+)(#[^)\s]*)?\)")
_FIGURE = re.compile(r"!\[(?P<text>[^\]]*)\]\((?P<path>[^)\s]+)-light\.svg\)")
_DIRECTIVE = re.compile(r"^::: (emag_export[\w.]*)", re.MULTILINE)


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, **_: Any) -> str:
    """Send links that leave the documents to the repository, and show each figure on its background.

    Raises:
        PluginError: If a link leads to no file.
    """
    docs = Path(config.docs_dir)
    source, repository = PurePosixPath(page.file.src_uri), str(config.repo_url).rstrip("/")

    def outside(match: re.Match[str]) -> str:
        target = os.path.normpath(docs / source.parent / match[2])
        if Path(target).is_relative_to(docs):
            return match[0]
        path = Path(target).relative_to(docs.parent)
        if not Path(target).exists():
            raise PluginError(f"{source}: there is no {path}; mend the link")
        kind = "tree" if Path(target).is_dir() else "blob"
        return f"](<{repository}/{kind}/main/{path.as_posix()}{match[3] or ''}>)"

    both = r"![\g<text>](\g<path>-light.svg#only-light)![\g<text>](\g<path>-dark.svg#only-dark)"
    return _FIGURE.sub(both, _LINK.sub(outside, markdown))


def on_post_build(*, config: MkDocsConfig, **_: Any) -> None:
    """Refuse a site in which a public name is missing.

    Raises:
        PluginError: With the names.
    """
    pages = "\n".join(path.read_text("utf-8") for path in Path(config.docs_dir).rglob("*.md"))
    with (Path(config.site_dir) / "objects.inv").open("rb") as file:
        documented = set(Inventory.parse_sphinx(file))
    if missing := undocumented(pages, documented):
        raise PluginError(
            f"no page documents {', '.join(missing)}: write docstrings, or add them to docs/reference"
        )


def undocumented(pages: str, documented: set[str]) -> list[str]:
    """Public names that no page documents.

    Args:
        pages: Markdown of all pages; modules that they name as ``::: module`` must be documented whole.
        documented: Full names that the site has an entry for.

    Returns:
        Full names in alphabetical order, those of the front door first by their short ones.
    """
    wanted = {f"emag_export.{name}" for name in importlib.import_module("emag_export").__all__}
    for name in _DIRECTIVE.findall(pages):
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError:
            continue  # the name of a class or a function
        wanted |= {f"{name}.{public}" for public in module.__all__}
    return sorted(wanted - documented - {"emag_export.__version__"})
