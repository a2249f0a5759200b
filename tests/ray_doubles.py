"""Stand-ins for replicas and for handles of Ray Serve, which answer what they were told to."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

from emag_export.serve.ray.replicas import ReplicaState
from emag_export.serve.ray.wire import HttpAnswer, HttpRequest, Message

JSON = [(b"content-type", b"application/json")]


def start(status: int = 200, headers: Any = JSON) -> Message:
    return {"type": "http.response.start", "status": status, "headers": headers}


def chunk(body: bytes, more: bool = False) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": more}


class Double:
    """Replicas of one model that answer a script: for each call messages, and perhaps an error after them."""

    def __init__(self, *scripts: list[Message | Exception], answers: Mapping[str, HttpAnswer] | None = None):
        self.scripts, self.answers = list(scripts), dict(answers or {})
        self.asked: list[HttpRequest] = []
        self.closed = 0

    async def stream(self, request: HttpRequest) -> AsyncGenerator[Message]:
        self.asked.append(request)
        try:
            for message in self.scripts.pop(0):
                if isinstance(message, Exception):
                    raise message
                yield message
        finally:
            self.closed += 1

    async def everyone(self, request: HttpRequest) -> list[tuple[str, HttpAnswer]]:
        self.asked.append(request)
        return list(self.answers.items())

    async def states(self) -> list[ReplicaState]:
        return []


class Handle:
    """Stands for a handle of Ray Serve: one answer to whoever asks one replica, one to whoever asks all."""

    def __init__(self, answer: Callable[[], AsyncGenerator[Message]], states: list[object]) -> None:
        self._answer, self._states = answer, states
        self.cancelled = 0

    def options(self, *, stream: bool) -> "Handle":
        assert stream
        return self

    @property
    def http(self) -> "Handle":
        return self

    def remote(self, request: HttpRequest) -> "Handle":
        self._messages = self._answer()
        return self

    def broadcast(self, method: str) -> "Handle":
        assert method == "state"
        return self

    async def results_async(self, *, timeout_s: float, return_exceptions: bool) -> list[object]:
        assert return_exceptions
        return self._states

    async def __anext__(self) -> Message:
        return await anext(self._messages)

    def __aiter__(self) -> "Handle":
        return self

    def cancel(self) -> None:
        self.cancelled += 1


async def raising(error: Exception) -> AsyncGenerator[Message]:
    nothing: list[Message] = []
    for message in nothing:
        yield message
    raise error


async def silent() -> AsyncGenerator[Message]:
    await asyncio.Event().wait()
    yield start()
