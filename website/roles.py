"""Docstrings name other things as Sphinx does; here these become links of mkdocs."""

import re
from typing import Any

from griffe import Extension, Object

__all__ = ["Roles", "linked"]

_ROLE = re.compile(r":(?P<role>\w+):`(?P<short>~?)(?P<name>[^`]+)`")


def linked(text: str, home: str) -> str:
    """``:class:`~a.b.C``` becomes a link to ``a.b.C``, where the site has it, and otherwise its name.

    Args:
        text: A docstring.
        home: Full name of the module or class that it stands in, for names without dots.
    """

    def link(match: re.Match[str]) -> str:
        name = match["name"]
        if match["role"] == "math":
            return f"`{name}`"
        shown = name.rpartition(".")[2] if match["short"] else name
        target = name if "." in name else f"{home}.{name}"
        return f'<autoref identifier="{target}" optional><code>{shown}</code></autoref>'

    return _ROLE.sub(link, text)


class Roles(Extension):
    """Applies :func:`linked` to every docstring that is read."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Called for every object of the package."""
        if obj.docstring is not None:
            home = obj.path if obj.is_module or obj.is_class else obj.path.rpartition(".")[0]
            obj.docstring.value = linked(obj.docstring.value, home)
