"""Clients that leave: whatever is done for one ends when nobody waits for it any more."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeVar

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from emag_export.serve.errors import ApiError

__all__ = ["ClientGoneError", "EventStream", "unless_gone"]

_T = TypeVar("_T")


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


async def unless_gone(receive: Receive, work: Awaitable[_T]) -> _T:
    """Do something while the client is there.

    Args:
        receive: Of ASGI; the request's body has been read from it.
        work: That the client waits for.

    Returns:
        What came of it.

    Raises:
        ClientGoneError: If it has left; the work is cancelled.
    """
    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
            with suppress(asyncio.CancelledError, ApiError):
                await task


async def _gone(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Server-sent events, until the last one or until the client leaves.

    Args:
        events: Each with its empty line. They may never be begun, if the client leaves early.
        ended: Called in every case, once.
    """

    def __init__(self, events: AsyncGenerator[str], ended: Callable[[], None]) -> None:
        # Proxies that collect an answer before they pass it on would make previews useless.
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._events, self._ended = events, ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        try:
            with suppress(ClientGoneError):
                await unless_gone(receive, self.stream_response(send))
        finally:
            try:
                await self._events.aclose()
            finally:
                self._ended()
