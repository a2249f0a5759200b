"""HTTP requests and answers as plain data, on their way between the front of a Ray application and a replica.

The front reads a request in full, so that it can look at it and send it twice; the replica runs its own ASGI
app on it. Nothing here knows Ray.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, MutableMapping
from dataclasses import dataclass
from typing import Any

from emag_export.serve.middleware import App, Receive, Scope

__all__ = ["HttpAnswer", "HttpRequest", "Message", "answer_of", "messages_of", "read_request"]

Message = MutableMapping[str, Any]
"""Of the ASGI protocol."""

_PLAIN = (
    *("type", "asgi", "http_version", "method", "scheme", "path", "raw_path"),
    *("query_string", "root_path", "client", "server"),
)
"""Keys of an ASGI scope that are plain data, beside the headers."""
_FAREWELL_SECONDS = 5.0
"""For an app to end by itself once its client has left."""


@dataclass(frozen=True, kw_only=True)
class HttpRequest:
    """A request that was read in full."""

    scope: dict[str, Any]
    body: bytes

    @property
    def method(self) -> str:
        """In capitals."""
        return str(self.scope["method"])

    @property
    def path(self) -> str:
        """Without the query."""
        return str(self.scope["path"])


@dataclass(frozen=True, kw_only=True)
class HttpAnswer:
    """An answer that was read in full."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...] = ()
    body: bytes = b""

    @property
    def messages(self) -> tuple[Message, Message]:
        """As ASGI sends it."""
        return (
            {"type": "http.response.start", "status": self.status, "headers": list(self.headers)},
            {"type": "http.response.body", "body": self.body},
        )


async def read_request(scope: Scope, receive: Receive) -> HttpRequest | None:
    """Read a request; how much and how long is for layers further out to limit.

    Returns:
        None if the client left before its end.
    """
    body = bytearray()
    more = scope["method"] not in ("GET", "HEAD", "DELETE")
    while more:
        message = await receive()
        if message["type"] != "http.request":
            return None
        body += message.get("body", b"")
        more = message.get("more_body", False)
    plain = {key: scope[key] for key in _PLAIN if key in scope}
    plain["headers"] = [(bytes(name), bytes(value)) for name, value in scope["headers"]]
    return HttpRequest(scope=plain, body=bytes(body))


async def messages_of(app: App, request: HttpRequest) -> AsyncGenerator[Message]:
    """Run an app on a request and pass on what it sends.

    Whoever closes this early, or is cancelled in it, is a client that has left: the app is told, and gets a
    moment to stop what it began.

    Args:
        app: Of a replica.
        request: Read in full.
    """
    sent: asyncio.Queue[Message | None] = asyncio.Queue()
    gone = asyncio.Event()
    bodies = [request.body]

    async def receive() -> Message:
        if bodies:
            return {"type": "http.request", "body": bodies.pop(), "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def run() -> None:
        try:
            await app({**request.scope, "headers": list(request.scope["headers"])}, receive, sent.put)
        finally:
            sent.put_nowait(None)

    task = asyncio.create_task(run())
    try:
        while (message := await sent.get()) is not None:
            yield message
        await task
    finally:
        gone.set()
        if not task.done():
            await asyncio.wait({task}, timeout=_FAREWELL_SECONDS)
            task.cancel()
            await asyncio.wait({task})


async def answer_of(messages: AsyncIterator[Message]) -> HttpAnswer:
    """Read an answer in full."""
    status, body = 500, bytearray()
    headers: tuple[tuple[bytes, bytes], ...] = ()
    async for message in messages:
        if message["type"] == "http.response.start":
            status = message["status"]
            headers = tuple((bytes(name), bytes(value)) for name, value in message.get("headers", ()))
        elif message["type"] == "http.response.body":
            body += message.get("body", b"")
    return HttpAnswer(status=status, headers=headers, body=bytes(body))
