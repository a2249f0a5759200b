"""Where the command line prints: results to standard output, everything else to standard error."""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

__all__ = ["out", "print_json", "progress_bar", "set_verbosity", "status", "table"]

out = Console(highlight=False)
"""Results."""
status = Console(stderr=True, highlight=False)
"""Progress, warnings and errors."""


def set_verbosity(level: int) -> None:
    """-1 silences progress and warnings, 0 is normal, 1 shows what libraries log, 2 shows their details."""
    status.quiet = level < 0
    logging.basicConfig(
        level=[logging.ERROR, logging.INFO, logging.DEBUG][max(0, min(level, 2))],
        handlers=[RichHandler(console=status, show_path=False)],
        format="%(message)s",
        force=True,
    )
    logging.getLogger("matplotlib").setLevel(logging.WARNING)


def quiet_libraries() -> None:
    """Keep the progress bars and notes of model libraries out of ours, in processes started from here too."""
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()
        library.set_verbosity_error()


class _Rate(ProgressColumn):
    """Steps a second."""

    def render(self, task: Task) -> Text:
        """A cell of the bar."""
        return Text("" if task.speed is None else f"{task.speed:.2f}/s")


@contextmanager
def progress_bar(description: str, total: int | None, *, rate: bool = False) -> Iterator[Progress]:
    """A bar on standard error for one task: the first of ``progress.task_ids``.

    Args:
        description: What is being done.
        total: Steps; None where their number is not known beforehand.
        rate: Show steps a second and the time left, too.
    """
    columns: tuple[ProgressColumn, ...] = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    if rate:
        columns += (_Rate(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, console=status, transient=True) as progress:
        progress.add_task(description, total=total)
        yield progress


def table(*headers: str, title: str | None = None) -> Table:
    """An empty table; numbers align to the right when their header begins with ``>``."""
    grid = Table(title=title, title_justify="left", header_style="bold")
    for header in headers:
        grid.add_column(header.removeprefix(">"), justify="right" if header.startswith(">") else "left")
    return grid


def print_json(data: Any) -> None:
    """One JSON document on standard output."""
    out.out(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False), highlight=False)
