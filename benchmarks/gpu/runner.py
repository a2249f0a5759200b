"""Run the items of a part, and leave a line for each result and for each failure."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from benchmarks.gpu.children import Ended, run_child
from benchmarks.gpu.items import Item, Options
from benchmarks.gpu.lines import Lines, key_of
from benchmarks.gpu.results import failure_is_a_result, key_in, result_of
from emag_export.bench.memory import HostMemory

__all__ = ["Runner"]

_LEAST = 20.0
"""Seconds that must be left of a part for another item to begin."""

_SHOWN = 200
"""Characters of a line that are printed; all of it is in the file."""


@dataclass(kw_only=True)
class Runner:
    """What the parts of one call of the script have in common."""

    options: Options
    lines: Lines
    seconds: float
    """That a part may take."""
    limit: float | None = None
    """Seconds that an item may take, in place of its own limit."""
    retry: bool = False
    """Items that failed before are run again."""
    report: Callable[[str], None] = print
    left: list[Item] = field(default_factory=list)
    """For which no time was left; the next call begins with them."""

    def run(self, part: str, items: Sequence[Item]) -> None:
        """Run what is not known yet of a part, and before it what that needs.

        Args:
            part: Its name.
            items: In their order; what prepares comes before what needs it.
        """
        deadline = time.monotonic() + self.seconds
        todo = self._unknown(items)
        broken: dict[Item, str] = {}
        for item in dict.fromkeys(items):
            if item not in todo:
                continue
            needed = [other for other in items if item.needs(other)]
            reason = next((f"{other.kind}: {broken[other]}" for other in needed if other in broken), None)
            if reason is not None:
                broken[item] = f"not run, because what it needs failed: {reason}"
                self._fail(part, item, broken[item])
            elif any(other in self.left for other in needed) or deadline - time.monotonic() < _LEAST:
                self._leave(item)
            elif failed := self._child(part, item, deadline - time.monotonic()):
                broken[item] = failed

    def _unknown(self, items: Sequence[Item]) -> set[Item]:
        """What has no line yet, and what prepares for it; a part that only prepares does all of it."""
        if all(item.prepares for item in items):
            return set(items)
        latest = self.lines.latest()

        def known(item: Item) -> bool:
            lines = [latest.get(key_of(axes)) for axes in item.axes(self.options)]
            return all(line is not None and not (self.retry and "failed" in line) for line in lines)

        unknown = {item for item in items if not item.prepares and not known(item)}
        for item in dict.fromkeys(items):
            if not item.prepares and item not in unknown:
                self.report(f"{_name(item)}: known")
        return unknown | {item for item in items if any(other.needs(item) for other in unknown)}

    def _child(self, part: str, item: Item, remaining: float) -> str | None:
        """Run an item; the reason if it failed."""
        limit = item.limit if self.limit is None else self.limit
        reading = _Reading(runner=self, part=part, item=item, before=key_in(item.folder(self.options)))
        ended = run_child(item.command(self.options), min(limit, remaining), reading.read)
        if ended.late and remaining < limit:
            self._leave(item)
            return None
        return reading.finish(ended, limit)

    def _leave(self, item: Item) -> None:
        self.left.append(item)
        self.report(f"{_name(item)}: no time left in this part; run it again")

    def _fail(self, part: str, item: Item, reason: str) -> None:
        for axes in item.axes(self.options):
            self.write(part, item, axes, {"failed": reason})

    def write(self, part: str, item: Item, axes: Mapping[str, Any], found: Mapping[str, Any]) -> None:
        """Put a line on the disk, and show it."""
        command = " ".join(["python", *item.command(self.options)[1:]])
        when = datetime.now(UTC).isoformat(timespec="seconds")
        self.lines.append({"part": part, "axes": axes, **found, "command": command, "when": when})
        shown = found["failed"][-_SHOWN:] if "failed" in found else json.dumps(found["result"])[:_SHOWN]
        guidance = f", {axes['guidance']}" if "guidance" in axes else ""
        self.report(f"{_name(item)}{guidance}: {'failed: ' if 'failed' in found else ''}{shown}")


@dataclass(kw_only=True)
class _Reading:
    """What an item's process has written so far."""

    runner: Runner
    part: str
    item: Item
    before: str | None
    """Key of the bundle that was there before."""
    began: float = field(default_factory=time.monotonic)
    text: list[str] = field(default_factory=list)
    written: set[str] = field(default_factory=set)
    memory: HostMemory | None = None

    def read(self, line: str, memory: HostMemory | None) -> None:
        """Speed comes one guidance a line and is kept at once; everything else is one document."""
        self.memory = memory
        if self.item.kind != "speed":
            self.text.append(line)
            return
        if not line.startswith("{"):
            return  # a library that prints
        result = json.loads(line)
        for axes in self.item.axes(self.runner.options):
            if axes["guidance"] == result["guidance"]:
                self._write(axes, {"result": result})

    def finish(self, ended: Ended, limit: float) -> str | None:
        """Leave the lines that are still missing; the reason if it failed."""
        missing = [axes for axes in self.item.axes(self.runner.options) if key_of(axes) not in self.written]
        data = self._document()
        if data is not None and (ended.code == 0 or failure_is_a_result(self.item.kind)):
            unchanged = self.item.kind == "build" and data["key"] == self.before
            result = None if unchanged else result_of(self.item.kind, data)
            if result is not None:
                self._write(missing[0], {"result": result})
            return None
        if ended.code == 0 and not missing:
            return None
        reason = _reason(ended, limit)
        for axes in missing:
            self._write(axes, {"failed": reason})
        return reason

    def _document(self) -> Any:
        try:
            return json.loads("".join(self.text))
        except json.JSONDecodeError:
            return None

    def _write(self, axes: Mapping[str, Any], found: Mapping[str, Any]) -> None:
        self.written.add(key_of(axes))
        memory = None if self.memory is None else asdict(self.memory)
        seconds = round(time.monotonic() - self.began, 2)
        self.runner.write(
            self.part, self.item, axes, {**found, "seconds": seconds, "host_memory_peak": memory}
        )


def _reason(ended: Ended, limit: float) -> str:
    if ended.late:
        return f"not done in {limit:g} s; {ended.said}".rstrip("; ")
    how = f"ended by signal {-ended.code}" if ended.code < 0 else f"exit code {ended.code}"
    return f"{how}: {ended.said or 'it said nothing'}"


def _name(item: Item) -> str:
    backend = "" if item.kind in ("build", "doctor", "product") else f", {item.backend or 'PyTorch eager'}"
    images = f", {item.images} pictures" if item.images > 1 else ""
    return f"{item.kind} {item.bundle}".rstrip() + backend + images
