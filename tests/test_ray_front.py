"""Serving on Ray without a cluster: what the front does with answers, losses and refusals of replicas."""

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from emag_export.serve.errors import ApiError
from emag_export.serve.ray.front import Front
from emag_export.serve.ray.replicas import NoReplicaError, ReplicaLostError
from emag_export.serve.ray.wire import HttpAnswer, HttpRequest, Message
from emag_export.serve.settings import ServerSettings
from tests.ray_doubles import JSON, Double, chunk, start

KEY = "k" * 32
EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8")]


def ask(
    models: Mapping[str, Any],
    method: str = "POST",
    path: str = "/v1/images/generations",
    front: Front | None = None,
    **options: Any,
) -> httpx2.Response:
    front = front or Front(models, ServerSettings())

    async def send() -> httpx2.Response:
        transport = httpx2.ASGITransport(app=front)
        async with httpx2.AsyncClient(transport=transport, base_url="http://front") as client:
            return await client.request(method, path, **options)

    return asyncio.run(send())


def error_of(response: httpx2.Response) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_an_answer_passes_through_with_one_request_id() -> None:
    headers = [*JSON, (b"x-request-id", b"of-the-replica"), (b"x-emag", b"1")]
    model = Double([start(headers=headers), chunk(b'{"a"', True), chunk(b": 1}")])
    response = ask({"a": model}, json={"prompt": "x"}, headers={"x-request-id": "12345678"})
    assert response.json() == {"a": 1}
    assert response.headers.get_list("x-request-id") == ["12345678"]
    assert response.headers["x-emag"] == "1"
    (asked,) = model.asked
    assert json.loads(asked.body) == {"prompt": "x"}
    assert (b"x-request-id", b"12345678") in asked.scope["headers"]


def test_a_replica_that_dies_before_its_first_byte_is_replaced_by_another() -> None:
    model = Double([start(), ReplicaLostError()], [start(), chunk(b"{}")])
    response = ask({"a": model}, json={"prompt": "x"})
    assert (response.status_code, response.json()) == (200, {})
    assert len(model.asked) == 2
    assert model.asked[0] == model.asked[1]


def test_a_request_that_kills_two_replicas_kills_no_third() -> None:
    model = Double([ReplicaLostError()], [ReplicaLostError()], [start(), chunk(b"{}")])
    response = ask({"a": model}, json={"prompt": "x"})
    assert response.status_code == 503
    assert error_of(response)["code"] == "replica_lost"
    assert int(response.headers["retry-after"]) > 0
    assert len(model.asked) == 2


def test_a_stream_that_is_lost_in_its_middle_ends_with_an_error_event() -> None:
    first = b"event: image_generation.partial_image\ndata: {}\n\n"
    model = Double([start(headers=EVENTS), chunk(first, True), ReplicaLostError()])
    response = ask({"a": model}, json={"prompt": "x", "stream": True})
    assert response.status_code == 200
    assert response.content.startswith(first)
    name, data = response.content[len(first) :].decode().strip().split("\n")
    assert name == "event: error"
    assert json.loads(data.removeprefix("data: "))["error"]["code"] == "replica_lost"
    assert len(model.asked) == 1


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (ApiError(429, "full", code="too_many_requests", retry_after=7), 429, "rate_limit_error"),
        (NoReplicaError(), 503, "service_unavailable"),
        (ApiError(500, "wrong"), 500, "server_error"),
    ],
)
def test_refusals_have_the_shape_of_openai(error: ApiError, status: int, kind: str) -> None:
    response = ask({"a": Double([error])}, json={"prompt": "x"})
    assert response.status_code == status
    assert error_of(response)["type"] == kind
    assert response.headers.get("retry-after") == (str(error.retry_after) if error.retry_after else None)


@pytest.mark.parametrize(
    ("content", "asked"),
    [
        (b'{"prompt": "x", "model": "b"}', "b"),
        (b'{"prompt": "x", "model": null}', "a"),
        (b'{"prompt": "x"}', "a"),
        (b'{"prompt": "x", "model": "c"}', "a"),  # that replica refuses it
        (b'{"prompt": "x", "model": ["b"]}', "a"),
        (b'["model"]', "a"),
        (b"[" * 100_000, "a"),
        (b"\xff", "a"),
    ],
)
def test_the_body_says_which_model_is_asked(content: bytes, asked: str) -> None:
    models = {name: Double([start(), chunk(name.encode())]) for name in ("a", "b")}
    assert ask(models, content=content).text == asked


def test_a_front_keeps_out_who_has_no_key_or_sends_too_much() -> None:
    model = Double([start(), chunk(b"{}")])
    front = Front({"a": model}, ServerSettings(api_keys=(KEY,), max_body=100))
    wrong = ask({}, front=front, json={"prompt": "x"}, headers={"Authorization": f"Bearer {KEY}x"})
    assert (wrong.status_code, error_of(wrong)["code"]) == (401, "invalid_api_key")
    right = {"Authorization": f"Bearer {KEY}"}
    assert ask({}, front=front, content=b"x" * 101, headers=right).status_code == 413
    assert not model.asked
    assert ask({}, front=front, json={"prompt": "x"}, headers=right).status_code == 200


def test_a_front_that_drains_refuses_pictures_and_answers_the_rest() -> None:
    model = Double(
        [start(), chunk(b'{"data": [1]}')], answers={"r": HttpAnswer(status=200, body=b'{"status": "ready"}')}
    )
    front = Front({"a": model}, ServerSettings())
    assert ask({}, "GET", "/health/ready", front=front).status_code == 200
    assert front.drain() == 0
    refused = ask({}, front=front, json={"prompt": "x"})
    assert (refused.status_code, error_of(refused)["code"]) == (503, "draining")
    assert "retry-after" in refused.headers
    assert ask({}, "GET", "/health/ready", front=front).status_code == 503
    assert ask({}, "GET", "/health/live", front=front).status_code == 200
    assert ask({}, "GET", "/v1/models", front=front).json() == {"object": "list", "data": [1]}


def test_a_front_counts_what_is_under_way_and_lets_go_of_it_when_its_client_leaves() -> None:
    async def scenario() -> None:
        waiting = asyncio.Event()

        class Slow(Double):
            async def stream(self, request: HttpRequest) -> AsyncGenerator[Message]:
                try:
                    yield start()
                    waiting.set()
                    await asyncio.Event().wait()
                finally:
                    self.closed += 1

        model = Slow()
        front = Front({"a": model}, ServerSettings())
        transport = httpx2.ASGITransport(app=front)
        async with httpx2.AsyncClient(transport=transport, base_url="http://front") as client:
            asking = asyncio.create_task(client.post("/v1/images/generations", json={"prompt": "x"}))
            await waiting.wait()
            assert front.drain() == 1
            asking.cancel()  # what Ray does to the call of a client that has left
            await asyncio.wait({asking})
        assert front.drain() == 0
        assert model.closed == 1

    asyncio.run(scenario())


def test_a_request_is_found_in_the_replica_that_knows_it() -> None:
    missing = HttpAnswer(status=404, headers=tuple(JSON), body=b'{"error": {}}')
    known = HttpAnswer(status=200, headers=tuple(JSON), body=b'{"id": "r"}')
    models = {"a": Double(answers={"1": missing}), "b": Double(answers={"2": missing, "3": known})}
    assert ask(models, "DELETE", "/v1/requests/r").json() == {"id": "r"}
    assert ask({"a": Double(answers={"1": missing})}, "GET", "/v1/requests/r").status_code == 404
    assert ask({"a": Double()}, "GET", "/v1/requests/r").status_code == 503


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [([[200], [200]], 200), ([[503, 200], [200]], 200), ([[503], [200]], 503), ([[200], []], 503)],
)
def test_ready_needs_one_ready_replica_of_every_model(statuses: list[list[int]], expected: int) -> None:
    models = {
        str(number): Double(
            answers={str(i): HttpAnswer(status=status, body=b"{}") for i, status in enumerate(row)}
        )
        for number, row in enumerate(statuses)
    }
    assert ask(models, "GET", "/health/ready").status_code == expected


def test_lists_and_figures_of_all_models_are_joined() -> None:
    kind = ((b"content-type", b"text/plain; version=0.0.4"),)
    page = '# HELP emag_a_total A.\n# TYPE emag_a_total counter\nemag_a_total{{model="m"}} {value}\n'
    pages = {
        name: HttpAnswer(status=200, headers=kind, body=page.format(value=value).encode())
        for name, value in (("r1", 1), ("r2", 2))
    }
    models = {
        "a": Double([start(), chunk(b'{"data": [{"id": "a"}]}')], answers=pages),
        "b": Double([start(), chunk(b'{"data": [{"id": "b"}]}')]),
    }
    assert ask(models, "GET", "/v1/models").json()["data"] == [{"id": "a"}, {"id": "b"}]
    response = ask(models, "GET", "/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    families = {family.name: family for family in text_string_to_metric_families(response.text)}
    assert families["emag_a"].type == "counter"
    found = {
        sample.labels["replica"]: sample.value
        for sample in families["emag_a"].samples
        if sample.name == "emag_a_total"
    }
    assert found == {"r1": 1, "r2": 2}
    assert {sample.labels["replica"] for sample in families["emag_draining"].samples} == {"front"}
