"""Serving on Ray: from a ``serve.yaml``, and from here until a signal."""

import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

from emag_export.bundle import Bundle
from emag_export.engines.config import EngineConfig
from emag_export.errors import BundleError, EngineError, InputError
from emag_export.packages import require_packages
from emag_export.records import parse_record
from emag_export.runtime.batching.options import BatchingOptions
from emag_export.serve.ray.deployments import make_application
from emag_export.serve.ray.sizing import Cluster, RayOptions, ReplicaPlan
from emag_export.serve.settings import ServerSettings, read_keys

__all__ = ["RayArguments", "build_app", "serve_on_ray"]

_APPLICATION = "emag-export"
"""As Ray Serve calls it."""
_LAST_ANSWERS = 1.0
"""Seconds for answers to leave Ray's proxy, once every picture is finished."""


@dataclass(frozen=True, kw_only=True)
class RayArguments:
    """``args`` of the application in a ``serve.yaml``."""

    bundles: tuple[Path, ...]
    """At the same path on every node."""
    ray: RayOptions = field(default_factory=RayOptions)
    server: ServerSettings = field(default_factory=ServerSettings)
    """Its host and port are not used: those of ``http_options`` are."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    batching: BatchingOptions = field(default_factory=BatchingOptions)
    api_key_file: Path | None = None


def build_app(args: Mapping[str, Any]) -> Any:
    """The application, for ``import_path: emag_export.serve.ray.app:build_app``.

    Args:
        args: Fields of :class:`RayArguments`.

    Returns:
        Ray Serve's ``Application``.

    Raises:
        InputError: If a field is missing, unknown or impossible, or nobody is kept out.
    """
    try:
        given = parse_record(RayArguments, args, name="the application's arguments", remedy="mend serve.yaml")
    except BundleError as error:
        raise InputError(error.message) from error
    if given.server.api_keys:
        raise InputError("Ray shows arguments to whoever may ask it, keys too; give `api_key_file` instead")
    if given.ray.address is not None:
        raise InputError("an address is for starting from elsewhere, here the cluster is known; leave it out")
    keys, _ = read_keys(given.api_key_file, os.environ)
    if not keys and not given.server.insecure:
        raise InputError(
            "there is no API key, and where Ray listens is not known here: give `api_key_file`, or say "
            "`insecure` if something else lets only the right people in"
        )
    settings = replace(given.server, api_keys=keys)
    return make_application(given.bundles, settings, given.engine, given.batching, given.ray)


def serve_on_ray(
    bundles: Sequence[Path],
    settings: ServerSettings,
    engine: EngineConfig,
    batching: BatchingOptions,
    options: RayOptions,
    ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve on Ray until a signal: the first one drains, a second one ends at once.

    Args:
        bundles: Folders that ``build`` wrote.
        settings: Where to listen, and limits.
        engine: How components are opened.
        batching: How many images share calls.
        options: Which cluster, and how many replicas.
        ready: Told the address once every model has a replica.

    Raises:
        MissingDependencyError: If Ray is absent.
        InputError: If the address is taken, there is no such cluster, or it has too little for the replicas.
        BundleError: If one is no bundle, or damaged.
        EngineError: If replicas do not start.
    """
    require_packages("ray", purpose="serving on Ray")
    for path in bundles:
        Bundle(path)
    settings = replace(settings, port=_free_port(settings))
    with _cluster(options, settings) as serve:
        if options.address is None:  # a cluster of somebody's own may grow when it is asked for more
            cluster = Cluster.now()
            ReplicaPlan.of(cluster, engine, options, len(bundles)).require_fit(cluster, len(bundles))
        _run(serve, lambda: make_application(bundles, settings, engine, batching, options))
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        with _signalled() as told:
            ready(f"http://{host}:{settings.port}")
            told.wait()
            _drain(serve, settings.drain_timeout)


def _free_port(settings: ServerSettings) -> int:
    """The port, which is free so far; Ray would only log that it is not."""
    with socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET) as found:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind((settings.host, settings.port))
        except OSError as error:
            raise InputError(
                f"{settings.host}:{settings.port} cannot be listened at ({error.strerror}); "
                "give another `port`, or 0 for any"
            ) from error
        return int(found.getsockname()[1])


@contextmanager
def _cluster(options: RayOptions, settings: ServerSettings) -> Iterator[Any]:
    """Ray Serve on a cluster that runs, or on one that lives as long as this."""
    local = options.address is None
    _set_environment(local)
    import ray
    from ray import serve

    quiet = {"logging_level": "WARNING", "log_to_driver": True}
    try:
        if local:
            ray.init("local", include_dashboard=False, **quiet)
        else:
            ray.init(address=options.address, **quiet)
    except ConnectionError as error:
        raise InputError(
            f"no Ray cluster answers at `ray_address` {options.address}, or its token is another one: start "
            "it, set its RAY_AUTH_TOKEN, or leave the address out"
        ) from error
    try:
        serve.start(
            proxy_location="HeadOnly" if local else "EveryNode",
            http_options={"host": settings.host, "port": settings.port},
            logging_config={"log_level": "WARNING", "enable_access_log": False},
        )
        yield serve
    finally:
        if not local:
            serve.delete(_APPLICATION)
        ray.shutdown()


def _set_environment(local: bool) -> None:
    """What Ray reads when it is imported; what the operator has set stays.

    Whoever reaches a port of Ray may run code on the cluster, so a cluster that is started here asks for a
    token. Where its user has none, one is made for this process and its children.
    """
    environment = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}
    if local:
        environment["RAY_AUTH_MODE"] = "token"
        if "RAY_AUTH_TOKEN_PATH" not in os.environ and not (Path.home() / ".ray/auth_token").exists():
            environment["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    for name, value in environment.items():
        os.environ.setdefault(name, value)


def _run(serve: Any, make: Callable[[], Any]) -> None:
    """Start the application and wait until every deployment has what it needs."""
    try:
        serve.run(make(), name=_APPLICATION, route_prefix="/")
    except RuntimeError as error:
        deployments = serve.status().applications[_APPLICATION].deployments.values()
        said = [line for row in deployments for line in row.message.strip().splitlines()[-1:]]
        raise EngineError(
            f"replicas did not start: {' '.join(said) or error}; their logs lie in "
            "/tmp/ray/session_latest/logs/serve"
        ) from error


@contextmanager
def _signalled() -> Iterator[threading.Event]:
    """Set by the first SIGTERM or Ctrl-C; the second one is Ctrl-C as usual."""
    told = threading.Event()

    def tell(number: int, frame: FrameType | None) -> None:
        if told.is_set():
            raise KeyboardInterrupt
        told.set()

    before = {number: signal.signal(number, tell) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _drain(serve: Any, seconds: float) -> None:
    """Take nothing new, and wait for what is there."""
    front = serve.get_app_handle(_APPLICATION)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        counts = front.broadcast("drain").results(timeout_s=seconds, return_exceptions=True)
        if not any(isinstance(count, int) and count for count in counts):
            break
        time.sleep(0.1)
    time.sleep(_LAST_ANSWERS)
