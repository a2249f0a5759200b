"""The server when more is asked than it can do, or something breaks: queues, limits, deadlines, engines."""

import asyncio
import time
from typing import Any

import httpx2
import pytest

from emag_export.errors import EngineError
from emag_export.runtime.keywords import amended
from emag_export.runtime.request import default_request
from emag_export.serve.app import State
from emag_export.serve.errors import ApiError
from emag_export.serve.requests import Requests, Running
from tests.house import House, body, events_of, house, openai_client, post, run
from tests.serving import PROMPT

__all__ = ["house"]


def test_a_request_can_be_watched_and_given_up(house: House) -> None:
    async def ask() -> None:
        async with house.client() as client:
            headers = {"x-request-id": "watched-request-1"}
            asked = asyncio.ensure_future(
                client.post("/v1/images/generations", json=body(num_inference_steps=100), headers=headers)
            )
            address = "/v1/requests/watched-request-1"
            for _ in range(200):
                state = (await client.get(address)).json()
                if state.get("step", 0) > 2:
                    break
                await asyncio.sleep(0.02)
            assert (state["status"], state["images"], state["steps"]) == ("running", 1, 100)
            assert (await client.delete(address)).status_code == 200
            answer = await asked
            assert (answer.status_code, answer.json()["error"]["code"]) == (409, "cancelled")
            state = (await client.get(address)).json()
            assert state["status"] == "cancelled" and state["step"] < 100
            again = await client.post("/v1/images/generations", json=body(), headers=headers)
            assert again.status_code == 409

    run(ask())
    assert house.batched.live == house.batched.waiting == 0


def test_ended_requests_are_forgotten_after_a_while(house: House) -> None:
    """Also those whose client left before the answer began."""
    now = [1000.0]
    known = Requests(lambda: now[0])
    (ticket,) = house.batched.submit([amended(default_request(house.batched.bundle, PROMPT), {"steps": 1})])
    known.add(Running(id="first", model=house.models[0], tickets=[ticket]))
    ticket.wait(60)
    (other,) = house.batched.submit([amended(default_request(house.batched.bundle, PROMPT), {"steps": 1})])
    known.add(Running(id="second", model=house.models[0], tickets=[other]))
    assert known.get("first").tickets == [] and known.get("first").state.status == "completed"
    now[0] = time.time() + 601
    other.wait(60)
    known.add(Running(id="third", model=house.models[0], tickets=[other]))
    assert "first" not in known and "second" not in known
    with pytest.raises(ApiError, match="more than ten minutes ago"):
        known.get("first")


def test_a_full_queue_says_when_to_come_again(house: House) -> None:
    """Four images are live, six may wait: an eleventh may not."""

    async def ask() -> list[httpx2.Response]:
        async with house.client() as client:
            slow = body(num_inference_steps=20)
            first = asyncio.ensure_future(client.post("/v1/images/generations", json={**slow, "n": 10}))
            while house.batched.unfinished < 10:
                await asyncio.sleep(0.01)
            refused = await client.post("/v1/images/generations", json=slow)
            return [refused, await first]

    refused, first = run(ask())
    assert first.status_code == 200
    error = refused.json()["error"]
    assert (refused.status_code, error["type"], error["code"]) == (429, "rate_limit_error", "queue_full")
    assert 1 <= int(refused.headers["retry-after"]) <= 120


def test_the_official_client_comes_again_when_it_is_told_to(house: House) -> None:
    async def ask() -> int:
        client = openai_client(house)
        slow = {"num_inference_steps": 12, "seed": 1}
        many = asyncio.ensure_future(client.images.generate(prompt=PROMPT, n=10, extra_body=slow))
        while house.batched.unfinished < 10:
            await asyncio.sleep(0.01)
        before = house.metrics.rejected.labels(model=house.models[0].name, reason="queue_full")._value.get()
        answer = await client.images.generate(prompt=PROMPT, extra_body={**slow, "num_inference_steps": 2})
        after = house.metrics.rejected.labels(model=house.models[0].name, reason="queue_full")._value.get()
        await many
        assert answer.data
        return int(after - before)

    assert run(ask()) >= 1, "it was refused at first"


def test_requests_and_streams_are_bounded(house: House) -> None:
    app = house.restricted(max_requests=2, max_streams=1)

    async def ask() -> tuple[list[str], list[int]]:
        async with house.client(app=app) as client:
            state: State = app.state.server
            slow = {"num_inference_steps": 30}
            open_stream = asyncio.ensure_future(events_of(client, **slow))
            while not state.streams:
                await asyncio.sleep(0.01)
            second = await client.post("/v1/images/generations", json=body(stream=True))
            waiting = asyncio.ensure_future(client.post("/v1/images/generations", json=body(**slow)))
            while len(state.here) < 2:
                await asyncio.sleep(0.01)
            third = await client.post("/v1/images/generations", json=body())
            await open_stream
            await waiting
            refused = (second, third)
            return [one.json()["error"]["code"] for one in refused], [one.status_code for one in refused]

    codes, statuses = run(ask())
    assert codes == ["too_many_streams", "too_many_requests"] and statuses == [429, 429]


def test_what_is_too_late_is_a_timeout(house: House) -> None:
    answer = post(house, num_inference_steps=100, emag={"deadline": 0.05})
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (504, "timeout", "emag.deadline")


def test_an_engine_that_fails_says_nothing_about_itself(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "CUDA error 700 in /opt/secret/libcuda.so"

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(secret)

    before = house.batched.reopened
    monkeypatch.setattr(house.batched.pipeline.denoiser, "run", broken)
    answer = post(house)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (500, "engine_failure") and secret not in answer.text
    assert post(house).status_code == 200, "the engine was opened again"
    assert house.batched.reopened == before + 1

    async def stream() -> list[tuple[str, dict[str, Any]]]:
        async with house.client() as client:
            return await events_of(client)

    monkeypatch.setattr(house.batched.pipeline.denoiser, "run", broken)
    ((name, data),) = run(stream())
    assert name == "error" and data["error"]["code"] == "engine_failure"


def test_a_mistake_of_ours_is_logged_and_not_shown(
    house: House, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise KeyError("a secret of ours")

    monkeypatch.setattr("emag_export.serve.images.requests_of", broken)
    answer = post(house)
    assert answer.status_code == 500 and "secret" not in answer.text
    assert answer.json()["error"]["type"] == "server_error"


def test_readiness_tells_what_is_wrong(house: House) -> None:
    app = house.restricted()

    async def ask() -> tuple[httpx2.Response, httpx2.Response, httpx2.Response]:
        async with house.client(app=app) as client:
            before = await client.get("/health/ready")
            app.state.server.drain()
            during = await client.get("/health/ready")
            return before, during, await client.post("/v1/images/generations", json=body())

    before, during, refused = run(ask())
    assert before.json() == {"status": "ready"}
    assert during.status_code == 503 and during.json()["status"] == "draining"
    assert refused.status_code == 503 and refused.headers["retry-after"]
    assert refused.json()["error"]["type"] == "service_unavailable"


def test_a_model_that_is_not_ready_is_unavailable(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(house.batched, "_failure", EngineError("no device"))
    answer = post(house)
    assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1
    assert "device" not in answer.text
