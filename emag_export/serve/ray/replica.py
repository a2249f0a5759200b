"""A replica: one bundle with its engine and step loop, and the same app as a server without Ray has."""

import logging
import os
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

from emag_export.engines.config import EngineConfig
from emag_export.errors import UnavailableError
from emag_export.runtime.batching.options import BatchingOptions
from emag_export.serve.app import create_app
from emag_export.serve.logs import set_up_logs
from emag_export.serve.metrics import Metrics
from emag_export.serve.models import open_models
from emag_export.serve.ray.replicas import ReplicaState, replica_name
from emag_export.serve.ray.scaling import IMAGES, PLACES
from emag_export.serve.ray.wire import HttpAnswer, HttpRequest, Message, answer_of, messages_of
from emag_export.serve.settings import ServerSettings

__all__ = ["ModelReplica"]


class ModelReplica:
    """What Ray Serve makes one of per GPU, or per some cores.

    Args:
        bundle: That it serves; it lies at the same path on every node.
        settings: Of the front. Keys are checked there, and do not come here.
        engine: How components are opened.
        batching: How many images share calls.
    """

    def __init__(
        self, bundle: Path, settings: ServerSettings, engine: EngineConfig, batching: BatchingOptions
    ) -> None:
        set_up_logs(settings.log_format)
        # The front writes the line of every request; what goes wrong is written where it does.
        logging.getLogger("emag.access").setLevel(logging.WARNING)
        metrics = Metrics()
        (self._model,) = open_models([bundle], engine, batching, metrics)
        self._app = create_app([self._model], replace(settings, api_keys=(), insecure=True), metrics)
        self._name = replica_name()

    async def http(self, request: HttpRequest) -> AsyncGenerator[Message]:
        """Answer a request, message by message."""
        async with aclosing(messages_of(self._app, request)) as messages:
            async for message in messages:
                yield message

    async def ask(self, request: HttpRequest) -> tuple[str, HttpAnswer]:
        """Answer a request that goes to every replica: the name of this one, and its answer."""
        return self._name, await answer_of(messages_of(self._app, request))

    async def state(self) -> ReplicaState:
        """How it stands."""
        batched = self._model.batched
        return ReplicaState(
            replica=self._name,
            process=os.getpid(),
            not_ready=batched.not_ready,
            images=batched.unfinished,
            retry_after=batched.retry_after(),
        )

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What the number of replicas is decided from; Ray Serve asks."""
        batched = self._model.batched
        return {IMAGES: float(batched.unfinished), PLACES: float(batched.sizing.room.live)}

    async def check_health(self) -> None:
        """Ray Serve asks, and replaces a replica that is not well three times in a row.

        Raises:
            UnavailableError: If no step ends, or an engine that failed does not come back: a new process is
                then the best that can be done.
        """
        if (reason := self._model.batched.not_ready) is not None:
            raise UnavailableError(reason)

    def __del__(self) -> None:
        model = self.__dict__.pop("_model", None)
        if model is not None:
            model.batched.close()
