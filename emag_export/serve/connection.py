"""Connections as uvicorn has them, and bounds that it has not: on the head of a request, in time and size."""

import asyncio
import json
import secrets
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from emag_export.serve.errors import ApiError

__all__ = ["bounded_protocol"]

_MOST = 1 << 20
"""Bytes that come without making a request; also what still comes of a body that was refused already."""


class _Bounded(asyncio.Protocol):
    """Goes before a protocol of uvicorn: hangs up where no request comes, and words refusals as we do."""

    seconds: float
    transport: Any
    cycle: Any
    """The newest request; uvicorn sets it once a head is whole."""
    _timer: asyncio.TimerHandle | None = None
    _without_request = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._watch(0)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch(len(data))

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """What uvicorn says to something that is not HTTP; it would be plain text."""
        body = json.dumps(ApiError(400, "this is no HTTP request", code="invalid_http").body)
        head = (
            "HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nx-request-id: req_{secrets.token_hex(12)}\r\n\r\n"
        )
        self.transport.write((head + body).encode())
        self.transport.close()

    def _watch(self, size: int) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop()
            return
        self._without_request += size
        if self._without_request > _MOST:
            self.transport.close()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self.seconds, self.transport.close)

    def _stop(self) -> None:
        self._without_request = 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def bounded_protocol(
    seconds: float, base: type[asyncio.Protocol] = AutoHTTPProtocol
) -> type[asyncio.Protocol]:
    """A protocol of uvicorn with bounds on what comes before a request.

    Args:
        seconds: For the head of a request; connections that idle after an answer are closed by uvicorn.
        base: One of uvicorn's.
    """
    return type("BoundedProtocol", (_Bounded, base), {"seconds": seconds})
