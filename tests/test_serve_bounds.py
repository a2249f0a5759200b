"""What a server does with clients in numbers, clients that leave, and bodies that are no requests."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import httpx2
import pytest

from emag_export.serve.app import State, create_app
from emag_export.serve.images import Drawing
from emag_export.serve.metrics import Metrics
from emag_export.serve.models import ServedModel
from emag_export.serve.schemas import GenerationBody
from emag_export.serve.settings import ServerSettings
from tests.house import KEY, House, body, house, post, run
from tests.serving import wait_for

__all__ = ["house"]

GENERATIONS = "/v1/images/generations"


def test_a_crowd_that_comes_at_once_gets_no_more_places_than_there_are(house: House) -> None:
    app = house.restricted(max_requests=4, max_streams=2)
    state: State = app.state.server
    most = {"requests": 0, "streams": 0, "images": 0}

    async def watch() -> None:
        while True:
            most["requests"] = max(most["requests"], len(state.here))
            most["streams"] = max(most["streams"], state.streams)
            most["images"] = max(most["images"], house.batched.unfinished)
            await asyncio.sleep(0)

    async def ask() -> list[httpx2.Response]:
        watching = asyncio.ensure_future(watch())
        async with house.client(app=app) as client:
            sent = [client.post(GENERATIONS, json=body(seed=n, stream=n % 2 == 0)) for n in range(20)]
            answers = await asyncio.gather(*sent)
        watching.cancel()
        return answers

    answers = run(ask())
    assert most == {"requests": 4, "streams": 2, "images": 4}
    assert sorted(answer.status_code for answer in answers) == [200] * 4 + [429] * 16
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers if answer.status_code == 429)
    assert not state.here and not state.streams


def test_more_pictures_than_there_are_places_is_no_reason_to_come_again(house: House) -> None:
    """Four live, six waiting: eleven would be told 429 for ever."""
    app = house.restricted(max_images=50)

    async def ask() -> tuple[httpx2.Response, httpx2.Response]:
        async with house.client(app=app) as client:
            return await client.post(GENERATIONS, json=body(n=11)), await client.get("/v1/models")

    refused, models = run(ask())
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "n"), refused.text
    assert "at most 10" in refused.json()["error"]["message"]
    assert models.json()["data"][0]["emag"]["max_images"] == 10


def scope() -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "path": GENERATIONS,
        "raw_path": GENERATIONS.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "scheme": "http",
        "server": ("x", 1),
        "client": ("x", 2),
    }


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "picture"])
def test_a_client_that_left_before_its_answer_began_frees_everything(house: House, stream: bool) -> None:
    app = house.restricted()
    text = json.dumps(body(num_inference_steps=100, n=4, stream=stream)).encode()
    messages: list[dict[str, Any]] = [{"type": "http.request", "body": text, "more_body": False}]

    async def receive() -> dict[str, Any]:
        return messages.pop() if messages else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if stream:
            await asyncio.sleep(3600)  # nobody takes even the head

    begun = time.monotonic()
    run(asyncio.wait_for(app(scope(), receive, send), 5))
    wait_for(lambda: house.batched.unfinished == 0, "free places", 5)
    assert time.monotonic() - begun < 1.5, "a hundred steps of four would take longer"
    state: State = app.state.server
    assert not state.here and not state.streams
    name = house.models[0].name
    assert state.metrics.requests.labels(model=name, outcome="cancelled")._value.get() == 1


def test_what_is_given_up_while_it_is_being_submitted_does_not_run(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tickets are made in a thread, which cannot be stopped."""
    real, entered, go_on = house.batched.submit, threading.Event(), threading.Event()
    made = []

    def slow(*args: Any, **options: Any) -> Any:
        entered.set()
        assert go_on.wait(10)
        made.extend(real(*args, **options))
        return made

    monkeypatch.setattr(house.batched, "submit", slow)

    async def ask() -> None:
        asked = GenerationBody(**body(num_inference_steps=100))
        drawing = Drawing("given-up", house.models[0], asked, ServerSettings(), Metrics())
        starting = asyncio.ensure_future(drawing.start(house.state.requests))
        await asyncio.to_thread(entered.wait, 10)
        starting.cancel()
        with suppress(asyncio.CancelledError):
            await starting
        drawing.end()
        go_on.set()

    run(ask())
    wait_for(lambda: made and made[0].done, "the end of the ticket", 5)
    assert made[0].status == "cancelled" and made[0].index < 100
    assert "given-up" not in house.state.requests


def test_bodies_that_arrive_at_the_same_time_are_bounded(house: House) -> None:
    app = house.restricted(max_requests=2, body_seconds=0.5)

    async def slow() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(5)

    async def ask() -> list[httpx2.Response]:
        async with house.client(app=app) as client:
            first = [asyncio.ensure_future(client.post(GENERATIONS, content=slow())) for _ in range(2)]
            await asyncio.sleep(0.1)
            third = await client.post(GENERATIONS, json=body())
            await asyncio.gather(*first)
            return [third, first[0].result(), await client.post(GENERATIONS, json=body())]

    third, late, afterwards = run(ask())
    assert (third.status_code, third.json()["error"]["code"]) == (429, "too_many_requests")
    assert third.headers["retry-after"] == "1"
    assert late.status_code == 408 and afterwards.status_code == 200


@pytest.mark.parametrize(
    ("content", "headers", "status", "param", "code"),
    [
        (b"[" * 100_000, {}, 400, None, "invalid_json"),
        (b'{"prompt": "\xe9"}', {}, 400, None, "invalid_json"),
        (b'{"prompt": "x", "seed": ' + b"1" * 5000 + b"}", {}, 400, None, "invalid_json"),
        (b'{"prompt": "x", "guidance_scale": NaN}', {}, 400, "guidance_scale", "invalid_value"),
        (b'{"prompt": "\\ud800 x"}', {}, 400, "prompt", "invalid_value"),
        (b'{"prompt": "x", "negative_prompt": "\\udfff"}', {}, 400, "negative_prompt", "invalid_value"),
        (b'{"prompt": "x"}', {"content-type": "text/plain"}, 400, None, "invalid_json"),
        (b'{"prompt": "x"}', {"content-encoding": "gzip"}, 415, None, "unsupported_encoding"),
    ],
)
def test_bodies_that_are_no_requests_are_refused(
    house: House, content: bytes, headers: dict[str, str], status: int, param: str | None, code: str
) -> None:
    app = house.restricted()
    given = {"content-type": "application/json", **headers}

    async def ask() -> httpx2.Response:
        async with house.client(app=app) as client:
            return await client.post(GENERATIONS, content=content, headers=given)

    answer = run(ask())
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (status, param, code), error
    if status == 400:
        rejected = app.state.server.metrics.registry.get_sample_value
        models = ("", house.models[0].name)
        found = [rejected("emag_rejected_total", {"model": one, "reason": "invalid"}) for one in models]
        assert sum(value or 0 for value in found) == 1


def test_an_answer_is_short_however_long_the_name_of_a_field(house: House) -> None:
    answer = post(house, **{"x" * 100_000: 1})
    assert answer.status_code == 400 and len(answer.content) < 500
    assert answer.json()["error"]["code"] == "unknown_parameter"


def test_requests_choose_among_models(house: House) -> None:
    first = house.models[0]
    other = ServedModel(name="other", batched=first.batched, created=1)
    app = create_app([first, other], ServerSettings(), Metrics())

    async def ask() -> None:
        async with house.client(app=app) as client:
            for given, expected in ((None, first.name), (first.name, first.name), ("other", "other")):
                asked = body(model=given, num_inference_steps=1)
                answer = await client.post(GENERATIONS, json=asked)
                assert answer.json()["emag"]["model"] == expected
            missing = await client.post(GENERATIONS, json=body(model="third"))
            assert missing.status_code == 404 and f"{first.name}, other" in missing.json()["error"]["message"]
            listed = (await client.get("/v1/models")).json()["data"]
            assert [model["id"] for model in listed] == [first.name, "other"]
            assert (await client.get("/v1/models/other")).json()["created"] == 1

    run(ask())


def test_a_request_of_which_some_is_finished_is_running(house: House) -> None:
    """Ten pictures, four at a time."""

    async def ask() -> set[tuple[str, bool]]:
        async with house.client() as client:
            headers, seen = {"x-request-id": "half-finished-1"}, set()
            asked = body(n=10, num_inference_steps=6)
            answer = asyncio.ensure_future(client.post(GENERATIONS, json=asked, headers=headers))
            while not answer.done():
                found = (await client.get("/v1/requests/half-finished-1")).json()
                seen.add((found.get("status", "unknown"), 0 < found.get("finished", 0) < 10))
                await asyncio.sleep(0.005)
            return seen

    seen = run(ask())
    assert {status for status, some in seen if some} == {"running"}


def references(node: Any) -> set[str]:
    if isinstance(node, dict):
        found = {node["$ref"]} if isinstance(node.get("$ref"), str) else set()
        return found.union(*map(references, node.values()))
    return set().union(*map(references, node)) if isinstance(node, list) else set()


def test_the_document_is_whole(house: House) -> None:
    closed = house.restricted(api_keys=(KEY,)).openapi()
    schemas = closed["components"]["schemas"]
    assert {"PartialImage", "Completed", "ErrorBody", "ModelFacts"} <= schemas.keys()
    assert {f"#/components/schemas/{name}" for name in schemas} >= references(closed)
    assert not [name for name in schemas if "Validation" in name or name.startswith("_")]
    for path, operations in closed["paths"].items():
        for operation in operations.values():
            assert "422" not in operation["responses"], path
            health = path.startswith("/health/")
            assert ("security" in operation, "401" in operation["responses"]) == (not health, not health), (
                path
            )
    answers = closed["paths"][GENERATIONS]["post"]["responses"]
    assert (
        "image_generation.completed"
        in answers["200"]["content"]["text/event-stream"]["schema"]["description"]
    )
    assert {"400", "413", "415", "429", "503", "504"} <= answers.keys()
    assert "securitySchemes" not in house.app.openapi()["components"]
