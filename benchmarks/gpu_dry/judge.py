"""Read the log of the stub libraries, and find what a captured or replayed call must not do."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Call", "Event", "judge", "read_log"]


@dataclass(frozen=True, kw_only=True)
class Event:
    """One line of the log: what was called, and with what."""

    name: str
    fields: dict[str, str]

    def __str__(self) -> str:
        """The line as it stood in the log."""
        return " ".join([self.name, *(f"{key}={value}" for key, value in self.fields.items())])


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of onnxruntime, and all that it did on the pretended GPU."""

    kind: str
    """``plain``, ``capture`` or ``replay``: what it was expected to be."""
    name: str
    number: int
    """``gpu_graph_id``."""
    events: tuple[Event, ...]

    @property
    def captured(self) -> tuple[Event, ...]:
        """Events between the beginning and the end of the capture."""
        names = [event.name for event in self.events]
        if "begin-capture" not in names or "end-capture" not in names:
            return ()
        return self.events[names.index("begin-capture") + 1 : names.index("end-capture")]


_CALL = re.compile(r"(plain|capture|replay) call=(.*) id=(-?\d+)")


def read_log(text: str) -> list[Call]:
    """Calls in order; what happened before the first and after the last is left out."""
    calls: list[tuple[re.Match[str], list[Event]]] = []
    inside = False
    for line in text.splitlines():
        name, _, rest = line.partition(" ")
        if name == "mark":
            mark = _CALL.fullmatch(rest)
            inside = mark is not None
            if mark:
                calls.append((mark, []))
        elif inside:
            fields = dict(field.partition("=")[::2] for field in rest.split())
            calls[-1][1].append(Event(name=name, fields=fields))
    return [
        Call(kind=mark[1], name=mark[2], number=int(mark[3]), events=tuple(events)) for mark, events in calls
    ]


def judge(calls: Sequence[Call]) -> list[str]:
    """What is wrong, one sentence each; nothing if all is as it should be."""
    graphs: dict[int, str] = {}
    found = []
    for call in calls:
        if call.kind == "plain":
            wrong = _plain(call)
        elif call.kind == "capture":
            wrong = _capture(call, graphs)
        else:
            wrong = _replay(call, graphs)
        found += [f"{call.kind} of {call.name} (graph id {call.number}): {text}" for text in wrong]
    return found


def _plain(call: Call) -> list[str]:
    """It may allocate, but the host neither waits nor copies."""
    wrong = [f"unexpected {event}" for event in call.events if event.name in _GRAPH_EVENTS]
    return wrong + [text for event in call.events if (text := _wait_or_copy(event))]


def _capture(call: Call, graphs: dict[int, str]) -> list[str]:
    """One capture, of everything, of nothing that a graph cannot hold; it is launched once."""
    made = [event.fields.get("graph", "refused") for event in call.events if event.name == "end-capture"]
    launched = [event.fields["graph"] for event in call.events if event.name == "launch-graph"]
    wrong = []
    if len(made) != 1 or launched != made or made[0] in graphs.values():
        wrong.append(f"one new graph was to be made and launched; made: {made}, launched: {launched}")
    if call.number in graphs:
        wrong.append(f"captured again; graph {graphs[call.number]} was made for this id")
    if not any("stream" in event.fields for event in call.captured):
        wrong.append("nothing was captured")
    if made:
        graphs[call.number] = made[-1]
    streams = {event.fields["stream"] for event in call.events if event.name == "begin-capture"}
    return wrong + [text for event in call.captured if (text := _not_for_graphs(event, streams))]


def _replay(call: Call, graphs: dict[int, str]) -> list[str]:
    """One launch of the graph that was made for this id, and nothing else whatever."""
    launched = [event.fields["graph"] for event in call.events if event.name == "launch-graph"]
    wrong = [f"unexpected {event}" for event in call.events if event.name != "launch-graph"]
    if call.number not in graphs or launched != [graphs[call.number]]:
        wrong.append(f"graph {graphs.get(call.number)} was to be launched once; launched: {launched}")
    return wrong


def _not_for_graphs(event: Event, streams: set[str]) -> str | None:
    """What is wrong with an event between the beginning and the end of a capture of these streams."""
    if event.name in ("malloc", "free", "host-function") or event.fields.get("refused") == "1":
        return f"cannot be captured: {event}"
    if "stream" in event.fields and event.fields["stream"] not in streams:
        return f"in a stream that is not captured: {event}"
    return _wait_or_copy(event)


def _wait_or_copy(event: Event) -> str | None:
    """Whether the host waits for the device, or data goes between the two."""
    ends = {event.fields.get("from", "device"), event.fields.get("to", "device")}
    if ends != {"device"} or event.fields.get("name") in _COPYING_FUNCTIONS:
        return f"copies between host and device: {event}"
    return f"the host waits: {event}" if event.name == "synchronize" else None


_GRAPH_EVENTS = {"begin-capture", "end-capture", "instantiate", "launch-graph"}
_COPYING_FUNCTIONS = {"cudaMemcpyFromSymbol"}
"""Of those that do nothing here."""
