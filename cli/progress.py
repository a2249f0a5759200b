"""Progress events as a bar on standard error, with a line for everything that stays."""

from rich.progress import Progress as Bar

from emag_export.progress import Event, Progress

__all__ = ["bar_reporter"]

_LINES = ("trace", "compile", "reuse")
"""Phases that leave a line."""


def bar_reporter(bar: Bar, prefix: str = "") -> Progress:
    """A function that shows events on a bar with one task.

    Args:
        bar: Of :func:`~emag_export.cli.console.progress_bar`.
        prefix: Of the lines: what the components are, if not graphs.
    """
    (task,) = bar.task_ids
    announced: set[tuple[str, str]] = set()

    def report(event: Event) -> None:
        what = f"{event.component}: {event.phase}"
        if event.total is None:
            bar.update(task, description=what, advance=1)
        else:
            bar.update(task, description=what, completed=event.done, total=max(event.total, 1))
        line = f"{event.component}: {prefix}{event.phase}"
        if event.phase == "written" and event.bytes is not None:
            bar.console.print(f"  {event.component}: {prefix}{event.bytes / 1e6:.1f} MB written")
        elif event.phase in _LINES and (event.component, event.phase) not in announced:
            announced.add((event.component, event.phase))
            bar.console.print(f"  {line}")

    return report
