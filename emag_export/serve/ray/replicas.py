"""The replicas of one model as the front sees them: ask one, ask all, and what can go wrong on the way."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from emag_export.serve.errors import ApiError
from emag_export.serve.ray.wire import HttpAnswer, HttpRequest, Message

__all__ = ["NoReplicaError", "RayReplicas", "ReplicaLostError", "ReplicaState", "Replicas", "replica_name"]

_PATIENCE = 2.0
"""Seconds without a sign of life after which a request asks whether there is any replica at all."""
_STATE_SECONDS = 5.0
"""For replicas to say how they are; one that cannot in this time is none."""
_RESTART_SECONDS = 15
"""What a client is told to wait for a replica to start: about what it takes with a small model."""


class ReplicaLostError(ApiError):
    """A replica has died, or was taken away, with a request in it."""

    def __init__(self) -> None:
        super().__init__(
            503,
            "the replica that worked on this was lost; try again",
            code="replica_lost",
            retry_after=_RESTART_SECONDS,
        )


class NoReplicaError(ApiError):
    """There is nobody to ask."""

    def __init__(self, message: str = "no replica of this model is running now; try again later") -> None:
        super().__init__(503, message, code="not_ready", retry_after=_RESTART_SECONDS)


@dataclass(frozen=True, kw_only=True)
class ReplicaState:
    """What a replica says about itself."""

    replica: str
    """Its name in Ray."""
    process: int
    not_ready: str | None
    images: int
    """That it has taken and not finished."""
    retry_after: int
    """Seconds until it likely has room for one image more."""


def replica_name() -> str:
    """What Ray calls the replica that this runs in; in its local testing mode they have no names."""
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        return str(serve.get_replica_context().replica_tag)
    except RayServeException:
        return "local"


@runtime_checkable
class Replicas(Protocol):
    """All replicas of one model."""

    def stream(self, request: HttpRequest) -> AsyncGenerator[Message]:
        """Let one of them answer, the least busy one as far as is known.

        Raises:
            ReplicaLostError: If it dies meanwhile.
            NoReplicaError: If there is none.
            ApiError: If all of them have as many requests as they take, or one's code fails.
        """
        ...

    async def everyone(self, request: HttpRequest) -> list[tuple[str, HttpAnswer]]:
        """Names and answers of all that answer."""
        ...

    async def states(self) -> list[ReplicaState]:
        """Of all that answer; none if there is none."""
        ...


class RayReplicas:
    """Replicas behind a handle of Ray Serve.

    Args:
        handle: A ``DeploymentHandle``; the deployment is made of
            :class:`~emag_export.serve.ray.replica.ModelReplica`.
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._streaming = handle.options(stream=True)

    async def stream(self, request: HttpRequest) -> AsyncGenerator[Message]:
        """See :class:`Replicas`."""
        answer = self._streaming.http.remote(request)
        ended = False
        try:
            message = await self._first(answer)
            while message is not None:
                yield message
                message = await anext(answer, None)
            ended = True
        except ApiError:
            raise
        except Exception as error:
            ended = True
            raise await self._translated(error) from error
        finally:
            if not ended:
                answer.cancel()

    async def everyone(self, request: HttpRequest) -> list[tuple[str, HttpAnswer]]:
        """See :class:`Replicas`."""
        return [answer for answer in await self._broadcast("ask", request) if isinstance(answer, tuple)]

    async def states(self) -> list[ReplicaState]:
        """See :class:`Replicas`."""
        return [state for state in await self._broadcast("state") if isinstance(state, ReplicaState)]

    async def _broadcast(self, method: str, *arguments: object) -> list[Any]:
        from ray.serve.exceptions import RayServeException

        try:
            found: list[Any] = await self._handle.broadcast(method, *arguments).results_async(
                timeout_s=_STATE_SECONDS, return_exceptions=True
            )
        except (RayServeException, TimeoutError):
            return []
        return found

    async def _first(self, answer: Any) -> Message | None:
        """The first message. A request must not wait for a replica that nobody starts."""
        coming = asyncio.ensure_future(anext(answer, None))
        try:
            while not (await asyncio.wait({coming}, timeout=_PATIENCE))[0]:
                if not await self.states():
                    raise NoReplicaError
            found: Message | None = await coming
            return found
        finally:
            coming.cancel()

    async def _translated(self, error: Exception) -> ApiError:
        """An answer for one of Ray's errors; what Ray says in them is for logs."""
        from ray.exceptions import RayError, RayTaskError
        from ray.serve import exceptions as serve

        if isinstance(error, serve.BackPressureError):
            return ApiError(
                429,
                "every replica of this model has as many requests as it takes; try again later",
                code="too_many_requests",
                retry_after=min([state.retry_after for state in await self.states()], default=None),
            )
        if isinstance(error, serve.DeploymentUnavailableError):
            return NoReplicaError("this model has failed to start; its operator finds why in the logs")
        if isinstance(error, RayTaskError):
            return ApiError(500, "something went wrong in a replica; its log says what")
        if isinstance(error, RayError | serve.RayServeException):
            return ReplicaLostError()
        return ApiError(500, "something went wrong between here and a replica; the log says what")
