"""The index of a batch: a line a picture, made from the table and the pictures themselves."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from emag_export.hashing import hash_file
from emag_export.packages import require_packages
from emag_export.serve.batch.plan import Drawable

__all__ = ["FORMATS", "index_rows", "write_index"]

FORMATS = ("jsonl", "parquet")
_CHUNK = 1000


def index_rows(plan: Drawable) -> Iterator[dict[str, Any]]:
    """What the index says of every picture that is there."""
    for item in plan.items():
        path = plan.output / item.path
        if path.exists():
            request = item.request
            yield {
                "row": item.row.number,
                "image": item.image,
                "prompt": request.prompt,
                "negative_prompt": request.negative_prompt,
                "seed": request.seed,
                "steps": request.steps,
                "height": request.height,
                "width": request.width,
                "guidance": request.guidance.name,
                "guidance_scale": request.guidance.scale,
                "emag_scale": request.guidance.emag_scale,
                "parameters": json.dumps(asdict(request), ensure_ascii=False),
                "path": item.path.as_posix(),
                "sha256": hash_file(path),
                **item.row.others,
            }


def write_index(plan: Drawable, form: str) -> Path:
    """Write the index whole, beside the pictures.

    Args:
        plan: Whose pictures are there.
        form: One of :data:`FORMATS`.

    Returns:
        The file.

    Raises:
        MissingDependencyError: If Parquet is asked for and pyarrow is absent.
    """
    path = plan.output / f"index.{form}"
    partial = path.with_name(f".{path.name}.partial")
    rows = index_rows(plan)
    if form == "parquet":
        _write_parquet(partial, rows)
    else:
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    partial.replace(path)
    return path


def _write_parquet(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    require_packages("pyarrow", purpose="writing Parquet")
    import pyarrow
    import pyarrow.parquet

    found = list(rows)
    names = list(dict.fromkeys(name for row in found for name in row))
    columns = {name: [row.get(name) for row in found] for name in names}
    try:
        table = pyarrow.table(columns)
    except pyarrow.ArrowException:  # a column of the user's own that mixes kinds: as text
        own = {name: [None if v is None else str(v) for v in columns[name]] for name in names[_OURS:]}
        table = pyarrow.table({**{name: columns[name] for name in names[:_OURS]}, **own})
    pyarrow.parquet.write_table(table, path, row_group_size=_CHUNK)


_OURS = 14
"""Columns that every row has; those of the table follow."""
