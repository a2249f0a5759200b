"""Records: frozen dataclasses that lie on the disk as JSON, and are read back strictly or not at all.

Every record has a ``format_version``, whose default is the version that is written; older ones are read where
somebody says how they become the next (``upgrades``). Types are checked without conversion, unknown fields
are refused, and the error names the file, the field and what to do. pydantic does the checking: serving needs
it anyway, it takes the dataclasses as they are, and it is imported only when a record is read (0.1 s).
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from emag_export.errors import BundleError, EmagError

if TYPE_CHECKING:
    from pydantic import ValidationError

__all__ = ["FORMAT_VERSION", "Upgrade", "dump_record", "parse_record", "read_record"]

FORMAT_VERSION = 1
"""Of every record that does not say otherwise."""

Upgrade = Callable[[dict[str, Any]], dict[str, Any]]
"""A record of one version as plain data, to the same of the next version."""

Record = TypeVar("Record")
"""A frozen dataclass of plain data."""


def dump_record(record: Any) -> str:
    """A record as JSON with a line per field, ended by a newline.

    Args:
        record: A dataclass; every field of it, however deep, is plain data.
    """
    return json.dumps(asdict(record), indent=2, ensure_ascii=False) + "\n"


def read_record(
    kind: type[Record],
    text: str | bytes,
    *,
    name: str,
    remedy: str,
    upgrades: Mapping[int, Upgrade] | None = None,
) -> Record:
    """A record of :func:`dump_record`.

    Args:
        kind: Its dataclass, which has the field ``format_version``.
        text: JSON.
        name: Of the file, for errors.
        remedy: What to do about a bad one, for errors.
        upgrades: Older version to what makes the next one of it.

    Raises:
        BundleError: If it is damaged, of another version, or a field is missing, unknown or impossible.
    """
    try:
        data = json.loads(text)
    except ValueError as error:
        raise BundleError(f"{name} is damaged: it is no JSON ({error}); {remedy}") from error
    if not isinstance(data, dict):
        raise BundleError(f"{name} is damaged: it holds {_shown(data)} instead of named fields; {remedy}")
    written: int = kind.__dataclass_fields__["format_version"].default  # type: ignore[attr-defined]
    _check_version(data, written, upgrades or {}, name, remedy)
    try:
        while data["format_version"] < written:
            data = (upgrades or {})[data["format_version"]](data)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise BundleError(
            f"{name} is damaged: {error!r} while it was read as an older version; {remedy}"
        ) from error
    return parse_record(kind, data, name=name, remedy=remedy)


def parse_record(kind: type[Record], data: Mapping[str, Any], *, name: str, remedy: str) -> Record:
    """The dataclass of plain data as JSON has it; arguments and errors as :func:`read_record`."""
    from pydantic import ValidationError

    checked: Any = kind
    try:
        found: Record = _reader(checked).model_validate_json(json.dumps({"record": data})).record
    except ValidationError as error:
        raise BundleError(f"{name} cannot be read: {_first(error)}; {remedy}") from error
    except EmagError as error:  # what a dataclass itself says of its values
        raise BundleError(f"{name} cannot be read: {error}; {remedy}") from error
    return found


def _check_version(
    data: Mapping[str, Any], written: int, upgrades: Mapping[int, Upgrade], name: str, remedy: str
) -> None:
    found = data.get("format_version")
    if type(found) is not int or found < min([written, *upgrades]):
        said = "no format_version" if found is None else f"format_version {_shown(found)}"
        raise BundleError(
            f"{name} has {said}, this emag-export reads {written}: an older one wrote it; {remedy}"
        )
    if found > written:
        raise BundleError(
            f"{name} has format_version {found}, this emag-export reads {written}: "
            f"upgrade emag-export, or {remedy}"
        )


@cache
def _reader(kind: Any) -> Any:
    """A pydantic model with one field of that type; its strictness holds for every dataclass inside."""
    from pydantic import ConfigDict, create_model

    return create_model("Record", __config__=ConfigDict(extra="forbid", strict=True), record=(kind, ...))


def _first(error: "ValidationError") -> str:
    """The first thing that is wrong: ``contract.heads: input should be a valid integer, got "2"``."""
    problems = error.errors(include_url=False)
    problem = problems[0]
    field = ".".join(map(str, problem["loc"][1:]))
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if problem["type"] == "missing":
        return f"{field} is missing{more}"
    if problem["type"] == "unexpected_keyword_argument":
        return f"{field} is no field of it{more}"
    said = problem["msg"][:1].lower() + problem["msg"][1:]
    return f"{field}: {said}, got {_shown(problem['input'])}{more}"


def _shown(data: Any) -> str:
    text = json.dumps(data, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
