"""What a batch is to draw and where it goes; what of it is there already."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from emag_export.bundle import Bundle
from emag_export.errors import BundleError, EmagError, InputError
from emag_export.runtime.keywords import SamplingKeywords, request_for
from emag_export.runtime.pictures.metadata import read_picture_record
from emag_export.runtime.request import GenerationRequest, check_prompts, plan_request
from emag_export.serve.batch.table import Row, read_table

__all__ = ["PICTURES", "BatchPlan", "Drawable", "Item", "is_drawn"]

PICTURES = "pictures"
"""Folder of the pictures, inside the output folder."""
_SHARD = 1000
"""Rows whose pictures share a folder."""
_SHOWN = 10
"""Mistakes that an error names."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One picture of a batch."""

    row: Row
    image: int
    """From 0, of those of its row."""
    request: GenerationRequest
    path: Path
    """Relative to the output folder."""


@runtime_checkable
class Drawable(Protocol):
    """Pictures that are to be drawn with one bundle into one folder."""

    @property
    def bundle(self) -> Bundle:
        """Draws them."""
        ...

    @property
    def output(self) -> Path:
        """Folder, to which their paths are relative."""
        ...

    def items(self) -> Iterator[Item]:
        """All of them, in the same order at every call."""
        ...


def is_drawn(plan: Drawable, item: Item, *, overwrite: bool = False) -> bool:
    """Whether a picture is there, made as it shall be.

    Args:
        plan: What is wanted.
        item: Of it.
        overwrite: Draw a picture anew that was made otherwise.

    Raises:
        InputError: If there is another one, and it may not be overwritten.
    """
    path = plan.output / item.path
    if not path.exists():
        return False
    try:
        same = read_picture_record(path).made_by(plan.bundle, item.request)
    except (InputError, BundleError):
        same = False
    if not same and not overwrite:
        raise InputError(
            f"{path} was made otherwise, from another table or with other options; "
            "choose another `output`, or add `overwrite`"
        )
    return same


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """A table, a bundle and a folder."""

    bundle: Bundle
    table: Path
    output: Path
    images: int = 1
    """Per row; their seeds count up."""
    keywords: SamplingKeywords
    """For what a row does not say."""

    def items(self) -> Iterator[Item]:
        """All pictures, in the order of the table; read anew at every call.

        Raises:
            InputError: If a row cannot be drawn; it names the first.
        """
        for row in read_table(self.table):
            yield from self._items_of(row)

    def check(self) -> int:
        """Look at every row before any work begins.

        Returns:
            How many pictures there are.

        Raises:
            InputError: Naming the first rows that cannot be drawn.
        """
        wrong: list[str] = []
        count, planned = 0, set[Any]()
        for row in read_table(self.table):
            try:
                for item in self._items_of(row):
                    count += 1
                    check_prompts(self.bundle, item.request)
                    alike = replace(item.request, prompt="-", negative_prompt="", seed=0)
                    if alike not in planned:
                        plan_request(self.bundle, item.request)
                        planned.add(alike)
            except EmagError as error:
                wrong.append(
                    error.message if error.message.startswith("row ") else f"row {row.number}: {error}"
                )
        if wrong:
            more = f"\nand {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
            raise InputError(
                f"{len(wrong)} rows of {self.table} cannot be drawn; nothing was begun:\n"
                + "\n".join(wrong[:_SHOWN])
                + more
            )
        if not count:
            raise InputError(f"{self.table} holds no prompt; write one a row")
        return count

    def _items_of(self, row: Row) -> Iterator[Item]:
        if isinstance(row.prompt, int) and self.bundle.labels is None:
            raise InputError(
                f"the prompt is the number {row.prompt}, and this model takes text; write a text"
            )
        words: Mapping[str, Any] = {**self.keywords, **row.keywords}
        base = request_for(self.bundle, str(row.prompt), words)  # type: ignore[arg-type]
        for image in range(self.images):
            request = replace(base, seed=base.seed + image)
            name = f"{row.number:06d}-{image}-seed{request.seed}.png"
            shard = f"{row.number // _SHARD * _SHARD:06d}"
            yield Item(row=row, image=image, request=request, path=Path(PICTURES) / shard / name)
