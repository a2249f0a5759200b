"""A server in this process: opened, listening, drained, ended."""

import asyncio
import signal
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

import uvicorn

from emag_export.engines.config import EngineConfig
from emag_export.errors import InputError
from emag_export.progress import Progress, silent
from emag_export.runtime.batching.options import BatchingOptions
from emag_export.serve.app import State, create_app
from emag_export.serve.connection import bounded_protocol
from emag_export.serve.logs import set_up_logs
from emag_export.serve.metrics import Metrics
from emag_export.serve.models import ServedModel, open_models
from emag_export.serve.settings import ServerSettings

__all__ = ["serve"]

_LAST_ANSWERS = 5
"""Seconds for answers to leave, once no picture is drawn any more."""
_TICK = 0.05


def serve(
    bundles: Sequence[Path],
    settings: ServerSettings,
    engine: EngineConfig,
    batching: BatchingOptions,
    *,
    progress: Progress = silent,
    ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve until a signal: the first one drains, a second one ends at once.

    The port is closed until everything is loaded and measured, so that nobody waits for an answer that may
    never come.

    Args:
        bundles: Folders that ``build`` wrote.
        settings: Where to listen, and limits.
        engine: How components are opened.
        batching: How many images share calls.
        progress: Told of everything before the port opens.
        ready: Told the address once the port is open.

    Raises:
        InputError: If the address is taken, or an option does not fit.
        BundleError: If one is no bundle, or damaged.
        EngineError: If a component does not load.
    """
    # The first process of a container ignores a signal that nobody handles, and loading takes a while.
    before = signal.signal(signal.SIGTERM, _end_now)
    listening = _listen(settings)
    metrics = Metrics()
    try:
        models = open_models(bundles, engine, batching, metrics, progress)
        try:
            set_up_logs(settings.log_format)
            asyncio.run(_serve(models, settings, metrics, listening, ready))
        finally:
            for model in models:
                model.batched.close()
    finally:
        listening.close()
        signal.signal(signal.SIGTERM, before)


def _end_now(number: int, frame: FrameType | None) -> None:
    """While nothing is served yet, there is nothing to finish."""
    raise SystemExit(128 + number)


def _listen(settings: ServerSettings) -> socket.socket:
    """The address, taken but not yet listened at: a server that cannot have it says so before it loads."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # Named as TCP: asyncio sends small answers at once on such sockets only, and 40 ms late on others.
    found = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # on Linux; connections inherit it
        # A client that takes nothing would keep its stream, and what was written for it, for ever.
        patience = int(settings.stalled_seconds * 1000)
        found.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, patience)
    try:
        found.bind((settings.host, settings.port))
    except OSError as error:
        found.close()
        raise InputError(
            f"{settings.host}:{settings.port} cannot be listened at ({error.strerror}); "
            "give another `port`, or 0 for any"
        ) from error
    return found


class _Server(uvicorn.Server):
    """Drains at the first signal."""

    def __init__(self, config: uvicorn.Config, state: State, drained: float) -> None:
        super().__init__(config)
        self._state, self._seconds = state, drained
        self.draining: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Of uvicorn, in the main thread between two steps of the event loop."""
        if self._state.draining:
            self.should_exit = self.force_exit = True
            return
        self._state.drain()
        self.draining = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        pipelines = [model.batched for model in self._state.models]
        for one in pipelines:
            one.drain(0)
        until = time.monotonic() + self._seconds
        while any(one.unfinished for one in pipelines) and time.monotonic() < until and not self.force_exit:
            await asyncio.sleep(_TICK)
        # Gives up what is not finished, so that whoever waits for it is told so, and may ask elsewhere.
        await asyncio.gather(*(asyncio.to_thread(one.close) for one in pipelines))
        until = time.monotonic() + _LAST_ANSWERS
        while self._state.here and time.monotonic() < until:
            await asyncio.sleep(_TICK)
        self.should_exit = True


async def _serve(
    models: Sequence[ServedModel],
    settings: ServerSettings,
    metrics: Metrics,
    listening: socket.socket,
    ready: Callable[[str], None],
) -> None:
    app = create_app(models, settings, metrics)
    config = uvicorn.Config(
        app,
        http=bounded_protocol(settings.body_seconds),
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=_LAST_ANSWERS,
        lifespan="off",
    )
    server = _Server(config, app.state.server, settings.drain_timeout)
    host, port = listening.getsockname()[:2]
    running = asyncio.ensure_future(server.serve(sockets=[listening]))
    while not server.started and not running.done():
        await asyncio.sleep(0.01)
    if server.started:
        ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")
    with suppress(KeyboardInterrupt):
        await running
