"""Tables of prompts: JSON lines, CSV or Parquet, read row by row, however long they are."""

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emag_export.errors import InputError
from emag_export.runtime.keyword_text import LISTS, keyword_fits, keyword_from
from emag_export.runtime.keywords import SAMPLING_KEYWORDS

__all__ = ["INDEX_COLUMNS", "Row", "read_table"]

INDEX_COLUMNS = ("row", "image", "path", "sha256")
"""Columns that an index adds, so that a table may not have them."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a table."""

    number: int
    """From 0, the heading not counted."""
    prompt: str | int
    """Text, or a class by its number."""
    keywords: Mapping[str, Any]
    """Of :class:`~emag_export.runtime.keywords.SamplingKeywords`, where the table has them."""
    others: Mapping[str, Any]
    """Everything else; it goes into the index as it is."""


def read_table(path: Path) -> Iterator[Row]:
    """Rows in their order; nothing is read before the first is asked for.

    Args:
        path: ``.jsonl``, ``.csv`` with a heading, or ``.parquet``.

    Raises:
        InputError: If the file cannot be read, or a row has no prompt or a value of the wrong kind.
        MissingDependencyError: If it is Parquet and pyarrow is absent.
    """
    readers = {".jsonl": _json_lines, ".csv": _csv_lines, ".parquet": _parquet_rows}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"`prompts` {path} ends in none of {', '.join(readers)}; rename or convert it")
    try:
        for number, fields in enumerate(reader(path)):
            yield _row(number, fields)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"`prompts` {path} cannot be read: {error}") from error


def _json_lines(path: Path) -> Iterator[Mapping[str, Any]]:
    with path.open(encoding="utf-8") as file:
        lines = (line for line in file if line.strip())
        for number, line in enumerate(lines):
            try:
                fields = json.loads(line)
            except ValueError as error:
                raise InputError(f"row {number} is no JSON ({error}); write one object a line") from error
            if not isinstance(fields, dict):
                raise InputError(f"row {number} is no JSON object; write one a line, with a prompt")
            yield fields


def _csv_lines(path: Path) -> Iterator[Mapping[str, Any]]:
    with path.open(encoding="utf-8", newline="") as file:
        for number, fields in enumerate(csv.DictReader(file)):
            if None in fields or None in fields.values():
                raise InputError(f"row {number} has more or fewer cells than the heading; quote its commas")
            try:
                yield {name: keyword_from(name, text) for name, text in fields.items() if text}
            except InputError as error:
                raise InputError(f"row {number}: {error.message}") from error


def _parquet_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    from emag_export.packages import require_packages

    require_packages("pyarrow", purpose="reading Parquet")
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for fields in batch.to_pylist():
                    yield {name: value for name, value in fields.items() if value is not None}
    except pyarrow.ArrowException as error:
        raise InputError(f"`prompts` {path} is no Parquet file: {error}") from error


def _row(number: int, fields: Mapping[str, Any]) -> Row:
    prompt = fields.get("prompt")
    if not isinstance(prompt, str | int) or isinstance(prompt, bool):
        raise InputError(f"row {number} has no text in the column prompt; every row needs one")
    if taken := [name for name in fields if name in INDEX_COLUMNS]:
        raise InputError(f"row {number} has a column {taken[0]}, which the index needs itself; rename it")
    keywords = {name: fields[name] for name in SAMPLING_KEYWORDS if name in fields}
    for name, value in keywords.items():
        if not keyword_fits(name, value):
            raise InputError(f"row {number}: `{name}` is {value!r}, which is of the wrong kind")
    for name in keywords.keys() & LISTS:
        keywords[name] = tuple(keywords[name])
    others = {name: value for name, value in fields.items() if name != "prompt" and name not in keywords}
    return Row(number=number, prompt=prompt, keywords=keywords, others=others)
