"""What happens around every request: its id and log line, its key, its size. Plain ASGI, no buffering.

Starlette's ``BaseHTTPMiddleware`` would hide a client's leaving from the routes below it.
"""

import asyncio
import hmac
import json
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from emag_export.serve.errors import ApiError
from emag_export.serve.metrics import Metrics
from emag_export.serve.settings import ServerSettings

__all__ = ["App", "Auth", "BodyLimit", "Outside", "Receive", "Scope", "Send", "send_error"]

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_log = logging.getLogger("emag.access")
_REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{8,64}")
_OPEN = ("/", "/health/live", "/health/ready")
"""Paths without a key, beside the page's files: an orchestrator asks for health, a browser for the page."""
_STATIC = "/static/"


async def send_error(send: Send, error: ApiError) -> None:
    """Answer with an error."""
    body = json.dumps(error.body).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    await send(
        {
            "type": "http.response.start",
            "status": error.status,
            "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
        }
    )
    await send({"type": "http.response.body", "body": body})


def _header(scope: Scope, name: bytes) -> str:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), "")


class Outside:
    """The outermost layer: request id, security headers, one log line, and no traceback for anybody.

    Args:
        app: What answers.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given, began = _header(scope, b"x-request-id"), time.perf_counter()
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
        scope.setdefault("state", {})["request_id"] = request_id
        facts: dict[str, Any] = scope["state"].setdefault("log", {})
        status = 0

        async def send_with_id(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", request_id.encode()),
                    (b"x-content-type-options", b"nosniff"),
                ]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            _log.exception("request %s failed", request_id)
            if not status:
                wrong = ApiError(500, "something went wrong here; the log has it under this request's id")
                await send_error(send_with_id, wrong)
        finally:
            line = {
                "request_id": request_id,
                "method": scope["method"],
                "path": scope["path"],
                "status": status or 499,  # the client left before there was an answer
                "seconds": round(time.perf_counter() - began, 4),
                **facts,
            }
            _log.info("request", extra={"facts": line})


class Auth:
    """Lets in who shows a key.

    Args:
        app: What answers.
        keys: Any of them; none lets everybody in.
        metrics: Told of refusals.
    """

    def __init__(self, app: App, keys: Sequence[str], metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http" and self._keys and not self._known(scope):
            self._metrics.rejected.labels(model="", reason="unauthorized").inc()
            refused = ApiError(
                401,
                "no valid API key; send one in the header Authorization: Bearer KEY",
                code="invalid_api_key",
            )
            await send_error(send, refused)
            return
        await self._app(scope, receive, send)

    def _known(self, scope: Scope) -> bool:
        path = scope["path"]
        if path in _OPEN or path.startswith(_STATIC):
            return True
        scheme, _, key = _header(scope, b"authorization").partition(" ")
        given = key.strip().encode("latin-1", "replace")
        # Every key is compared, each in constant time: how long it takes says nothing about any of them.
        found = [hmac.compare_digest(given, known) for known in self._keys]
        return scheme.lower() == "bearer" and any(found)


class BodyLimit:
    """Refuses bodies that are too large, too slow, too many or compressed, before they are kept.

    Args:
        app: What answers.
        settings: With the limits.
    """

    def __init__(self, app: App, settings: ServerSettings) -> None:
        self._app, self._settings = app, settings
        self._arriving = 0
        """Bodies that are being read."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "DELETE"):
            await self._app(scope, receive, send)
            return
        try:
            self._check(scope)
            self._arriving += 1
            try:
                body = await asyncio.wait_for(self._read(receive), self._settings.body_seconds)
            finally:
                self._arriving -= 1
        except TimeoutError:
            late = f"the body was not there after {self._settings.body_seconds:g} seconds; send it faster"
            await send_error(send, ApiError(408, late, code="body_too_slow"))
            return
        except ApiError as error:
            await send_error(send, error)
            return
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_read() -> MutableMapping[str, Any]:
            return messages.pop() if messages else await receive()

        await self._app(scope, receive_read, send)

    def _check(self, scope: Scope) -> None:
        """What its head says of a body."""
        if (coding := _header(scope, b"content-encoding").lower()) not in ("", "identity"):
            said = f"the body is said to be compressed ({coding[:20]!r}); send it as it is"
            raise ApiError(415, said, code="unsupported_encoding")
        length = _header(scope, b"content-length")
        if length.isdecimal() and int(length) > self._settings.max_body:
            raise self._too_large()
        if self._arriving >= self._settings.max_requests:
            said = f"{self._arriving} requests are arriving, which is the most; try again later"
            raise ApiError(429, said, code="too_many_requests", retry_after=1)

    def _too_large(self) -> ApiError:
        said = f"the body is larger than {self._settings.max_body} bytes; send less"
        return ApiError(413, said, code="body_too_large")

    async def _read(self, receive: Receive) -> bytes:
        chunks, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ApiError(400, "the body ended before it was whole", code="body_incomplete")
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            if size > self._settings.max_body:
                raise self._too_large()
            more = message.get("more_body", False)
        return b"".join(chunks)
