"""Connections that bring no request, clients that take no answer, and what of them reaches the log."""

import asyncio
import json
import logging
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.auto import AutoHTTPProtocol
from uvicorn.protocols.http.h11_impl import H11Protocol

from emag_export.serve.clients import EventStream
from emag_export.serve.connection import bounded_protocol
from emag_export.serve.logs import set_up_logs
from emag_export.serve.run import _listen
from emag_export.serve.settings import ServerSettings

PROTOCOLS = sorted({AutoHTTPProtocol, H11Protocol}, key=lambda one: one.__name__)


def test_events_that_were_never_begun_are_ended_once() -> None:
    ended, begun = [], []

    async def events() -> AsyncIterator[str]:
        begun.append(1)
        yield "event"

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        await asyncio.sleep(3600)

    stream = EventStream(events(), lambda: ended.append(1))  # type: ignore[arg-type]
    asyncio.run(asyncio.wait_for(stream({"type": "http"}, receive, send), 5))
    assert ended == [1] and not begun


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_nothing_that_a_client_sends_speaks_to_a_terminal(
    log_format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    loggers = [logging.getLogger(name) for name in ("emag", "uvicorn.error")]
    before = [(one.handlers, one.propagate, one.level) for one in loggers]
    try:
        set_up_logs(log_format)
        logging.getLogger("emag.access").info(
            "request", extra={"facts": {"path": "/\r\n2026 INFO all is well \x1b[2J\x9b2J\u2028"}}
        )
    finally:
        for one, (handlers, propagate, level) in zip(loggers, before, strict=True):
            one.handlers, one.propagate = handlers, propagate
            one.setLevel(level)
    (line,) = capsys.readouterr().err.split("\n")[:-1]
    assert all(letter.isprintable() for letter in line) and "all is well" in line


@asynccontextmanager
async def listening(app: Any, protocol: type[asyncio.Protocol]) -> AsyncIterator[int]:
    """A server of uvicorn in this process."""
    taken = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, http=protocol, ws="none", log_config=None, lifespan="off", access_log=False)
    server = uvicorn.Server(config)
    running = asyncio.ensure_future(server._serve(sockets=[taken]))
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield taken.getsockname()[1]
    finally:
        server.should_exit = True
        await running


async def answer_after(port: int, *pieces: bytes, pause: float = 0.0) -> tuple[bytes, float]:
    """What comes until the server hangs up, and after how long it does."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    begun = time.monotonic()
    with suppress(ConnectionError):
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause)
    found = b""
    with suppress(ConnectionError):
        found = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    return found, time.monotonic() - begun


@pytest.mark.parametrize("base", PROTOCOLS)
def test_connections_without_a_request_are_closed(base: type[asyncio.Protocol]) -> None:
    app = FastAPI()

    @app.get("/slow")
    async def slow() -> str:
        await asyncio.sleep(0.8)
        return "done"

    request = b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n"

    async def ask() -> None:
        async with listening(app, bounded_protocol(0.3, base)) as port:
            silent, half, fast, again, rubbish, endless = await asyncio.gather(
                answer_after(port),
                answer_after(port, request[:-4]),
                answer_after(port, request.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")),
                answer_after(port, request, b"GET /sl", pause=1.2),
                answer_after(port, b"\x00\xff" * 50),
                answer_after(port, b"GET / HTTP/1.1\r\nHost: x\r\n", *[b"X: " + b"y" * 60_000] * 30),
            )
        assert silent[0] == half[0] == b"" and 0.25 < silent[1] < 2 and 0.25 < half[1] < 2
        assert fast[0].endswith(b'"done"'), "a request takes as long as it takes"
        assert again[0].endswith(b'"done"') and again[1] < 4, "the second head never came"
        head, _, said = rubbish[0].partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ") and b"x-request-id: req_" in head
        assert json.loads(said)["error"]["code"] == "invalid_http"
        assert endless[1] < 2

    asyncio.run(ask())


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="only Linux cuts clients that stall")
def test_a_client_that_takes_nothing_is_cut() -> None:
    with _listen(ServerSettings(port=0, stalled_seconds=0.5)) as server:
        server.listen()
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(server.getsockname())
            taken, _ = server.accept()
            with taken, pytest.raises(TimeoutError, match="timed out") as found:
                taken.settimeout(15)  # in Python's own words, without a number
                while True:
                    taken.sendall(b"x" * 100_000)
            assert found.value.errno is not None, "the kernel cut it, not the limit of this test"
