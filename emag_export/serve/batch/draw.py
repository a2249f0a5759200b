"""Thousands of pictures from a table of prompts: resumable, in one process.

A picture is renamed into place when it is whole, and remembers how it was made. So nothing else has to be
remembered: whatever ends the work, the next run sees what is there.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from emag_export.errors import EmagError, EngineError, UnavailableError
from emag_export.runtime.batching.pipeline import BatchedPipeline
from emag_export.runtime.batching.ticket import Ticket
from emag_export.runtime.pictures.metadata import save_picture
from emag_export.serve.batch.plan import PICTURES, Drawable, Item, is_drawn

__all__ = ["BatchResult", "draw", "pending", "record_failures", "remove_leftovers"]

_ATTEMPTS = 2
FAILED = "failed.jsonl"


@dataclass(kw_only=True)
class BatchResult:
    """What became of a batch."""

    drawn: int = 0
    kept: int = 0
    """There already, from an earlier run."""
    failed: list[tuple[Item, str]] = field(default_factory=list)


Tell = Callable[[int], None]
"""Told how many pictures are there after each of them."""


def remove_leftovers(output: Path) -> None:
    """Delete what a killed run left half written."""
    for path in (output / PICTURES).rglob(".*.partial"):
        path.unlink()


def pending(plan: Drawable, result: BatchResult, *, overwrite: bool = False) -> Iterator[Item]:
    """Pictures that are still to be drawn; the others are counted.

    Args:
        plan: What is wanted.
        result: Told of pictures that are there.
        overwrite: Draw pictures anew that were made otherwise.

    Raises:
        InputError: If a picture was made otherwise and may not be overwritten.
    """
    for item in plan.items():
        if is_drawn(plan, item, overwrite=overwrite):
            result.kept += 1
        else:
            yield item


def draw(
    todo: Iterator[Item],
    output: Path,
    batched: BatchedPipeline,
    result: BatchResult,
    tell: Tell = lambda done: None,
) -> None:
    """Draw pictures, each saved as soon as it is whole.

    Args:
        todo: Of :func:`pending`; asked for as there is room, so that a long table is never in memory.
        output: Folder of the batch.
        batched: Draws.
        result: Counts what became of them.
        tell: Told of progress.

    Raises:
        InputError: If a picture was made otherwise and may not be overwritten.
    """
    window = 2 * batched.sizing.room.live
    under_way: list[_UnderWay] = []
    more = True
    try:
        while more or under_way:
            while more and len(under_way) < window:
                item = next(todo, None)
                if item is None:
                    more = False
                else:
                    under_way.append((item, _submit(batched, item), 1))
            if under_way:
                _settle(output, batched, under_way, result)
            tell(result.drawn + result.kept + len(result.failed))
    finally:
        for _, ticket, _ in under_way:
            ticket.cancel()


_UnderWay = tuple[Item, Ticket, int]
"""A picture, its ticket, and the number of the attempt."""


def _submit(batched: BatchedPipeline, item: Item) -> Ticket:
    while True:
        try:
            (ticket,) = batched.submit([item.request])
        except UnavailableError:  # an engine that failed is being opened again
            time.sleep(0.5)
        else:
            return ticket


def _settle(output: Path, batched: BatchedPipeline, under_way: list[_UnderWay], result: BatchResult) -> None:
    """Wait for the oldest picture and take all that are finished."""
    under_way[0][1].wait()
    for entry in [entry for entry in under_way if entry[1].done]:
        under_way.remove(entry)
        item, ticket, attempt = entry
        try:
            save_picture(ticket.result(), output / item.path)
            result.drawn += 1
        except EngineError as error:
            if attempt < _ATTEMPTS:
                under_way.append((item, _submit(batched, item), attempt + 1))
            else:
                result.failed.append((item, str(error)))
        except EmagError as error:
            result.failed.append((item, str(error)))


def record_failures(plan: Drawable, result: BatchResult) -> Path | None:
    """Write the pictures that could not be drawn, or delete the list of an earlier run."""
    path = plan.output / FAILED
    if not result.failed:
        path.unlink(missing_ok=True)
        return None
    lines = [
        {"row": item.row.number, "image": item.image, "prompt": item.request.prompt, "error": error}
        for item, error in result.failed
    ]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8")
    return path
