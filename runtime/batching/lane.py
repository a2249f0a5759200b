"""Work that goes on beside the loop: one thread, in order, one piece at a time."""

from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread

__all__ = ["Lane"]


class Lane:
    """Runs functions in a thread of its own.

    Args:
        name: Of the thread.
    """

    def __init__(self, name: str) -> None:
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def backlog(self) -> int:
        """Pieces that wait."""
        return self._queue.qsize()

    def put(self, work: Callable[[], None]) -> None:
        """Let a function wait for its turn; it must not raise."""
        self._queue.put(work)

    def close(self) -> None:
        """Finish what waits, then end the thread."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            work()
