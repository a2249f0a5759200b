"""Between the front and its replicas: requests as data, errors of Ray, clients that leave."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from emag_export.serve.errors import ApiError
from emag_export.serve.ray import replicas
from emag_export.serve.ray.replicas import NoReplicaError, RayReplicas, ReplicaLostError, ReplicaState
from emag_export.serve.ray.wire import HttpRequest, Message, answer_of, messages_of, read_request
from tests.ray_doubles import Handle, chunk, raising, silent, start

# What Ray 2.60 does as it is imported.
rays_own = pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`:DeprecationWarning")

STATE = ReplicaState(replica="r", process=1, not_ready=None, images=3, retry_after=4)
REQUEST = HttpRequest(scope={"type": "http", "headers": []}, body=b"")


def test_an_app_is_told_when_its_client_leaves() -> None:
    async def scenario() -> list[str]:
        seen: list[str] = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            seen.append((await receive())["body"].decode())
            await send(start())
            seen.append((await receive())["type"])

        request = HttpRequest(scope={"type": "http", "headers": []}, body=b"body")
        messages = messages_of(app, request)
        assert (await anext(messages))["status"] == 200
        await messages.aclose()
        return seen

    assert asyncio.run(scenario()) == ["body", "http.disconnect"]


def test_what_an_app_raises_is_raised() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise ValueError("of the app")

    request = HttpRequest(scope={"type": "http", "headers": []}, body=b"")
    with pytest.raises(ValueError, match="of the app"):
        asyncio.run(answer_of(messages_of(app, request)))


def test_a_request_that_breaks_off_is_none() -> None:
    async def receive() -> Message:
        return messages.pop(0)

    messages: list[Message] = [
        {"type": "http.request", "body": b"a", "more_body": True},
        {"type": "http.disconnect"},
    ]
    assert asyncio.run(read_request({"method": "POST", "headers": []}, receive)) is None


@rays_own
def test_errors_of_ray_are_worded_for_clients() -> None:
    pytest.importorskip("ray")
    from ray import exceptions as ray_errors
    from ray.serve import exceptions as serve_errors
    from ray.serve._private.common import DeploymentID

    cases: list[tuple[Exception, int, str | None]] = [
        (serve_errors.BackPressureError(9, 8), 429, "too_many_requests"),
        (ray_errors.ActorDiedError(), 503, "replica_lost"),
        (ray_errors.ActorUnavailableError("away", None), 503, "replica_lost"),
        (ray_errors.WorkerCrashedError(), 503, "replica_lost"),
        (serve_errors.ReplicaUnavailableError("r"), 503, "replica_lost"),
        (serve_errors.DeploymentUnavailableError(DeploymentID("d", "a")), 503, "not_ready"),
        (ray_errors.RayTaskError("f", "traceback /secret/path", ValueError("secret")), 500, None),
        (OSError("secret"), 500, None),
    ]
    for error, status, code in cases:
        handle = Handle(lambda error=error: raising(error), [STATE, ray_errors.ActorDiedError()])  # type: ignore[misc]
        with pytest.raises(ApiError) as caught:
            asyncio.run(answer_of(RayReplicas(handle).stream(REQUEST)))
        assert (caught.value.status, caught.value.code) == (status, code), error
        assert "secret" not in caught.value.message
        assert isinstance(caught.value, ReplicaLostError) == (code == "replica_lost")
        if status == 429:
            assert caught.value.headers == {"Retry-After": "4"}


@rays_own
def test_a_request_does_not_wait_for_a_replica_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setattr(replicas, "_PATIENCE", 0.01)
    handle = Handle(silent, [])
    with pytest.raises(NoReplicaError):
        asyncio.run(answer_of(RayReplicas(handle).stream(REQUEST)))
    assert handle.cancelled == 1

    async def busy() -> None:
        await asyncio.wait_for(answer_of(RayReplicas(Handle(silent, [STATE])).stream(REQUEST)), 0.2)

    with pytest.raises(TimeoutError):  # its replica lives and is slow: that is waited for
        asyncio.run(busy())


@rays_own
def test_leaving_early_cancels_the_call() -> None:
    pytest.importorskip("ray")

    async def two() -> AsyncGenerator[Message]:
        yield start()
        yield chunk(b"x")

    async def scenario(leave: bool) -> int:
        handle = Handle(two, [])
        messages = RayReplicas(handle).stream(REQUEST)
        await anext(messages)
        if leave:
            await messages.aclose()
        else:
            await answer_of(messages)
        return handle.cancelled

    assert asyncio.run(scenario(leave=True)) == 1
    assert asyncio.run(scenario(leave=False)) == 0
