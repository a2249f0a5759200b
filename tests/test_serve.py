"""The server over HTTP in this process: pictures, streams, errors, limits, figures."""

import asyncio
import base64
import json
import logging
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest

from emag_export.bundle import Bundle
from emag_export.engines.config import EngineConfig
from emag_export.errors import EngineError, InputError
from emag_export.runtime.batching.options import BatchingOptions
from emag_export.runtime.keywords import amended
from emag_export.runtime.pictures.metadata import read_picture_record
from emag_export.runtime.pipeline import Pipeline
from emag_export.runtime.request import default_request
from emag_export.serve.app import State
from emag_export.serve.errors import FIELDS, ApiError
from emag_export.serve.metrics import METRICS, Metrics
from emag_export.serve.models import open_models
from emag_export.serve.requests import Requests, Running
from emag_export.serve.settings import ServerSettings, read_keys
from tests.house import KEY, House, body, events_of, house, pixels, post, run
from tests.serving import PROMPT

__all__ = ["house"]

# Of 255. Images share calls here; measured on this model: no pixel differs.
ONE_LEVEL = 1


def test_a_picture_is_that_of_the_pipeline_and_says_how_it_was_made(house: House, tmp_path: Path) -> None:
    emag = {"guidance": "emag", "scale": 1.7, "beta": 0.9, "strength": 0.5, "blocks": [4]}
    answer = post(house, seed=7, guidance_scale=5.0, negative_prompt="a ring", emag=emag)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert found["data"][0]["seed"] == 7 and found["size"] == "64x64"
    assert found["emag"]["request_id"] == answer.headers["x-request-id"]
    path = tmp_path / "served.png"
    path.write_bytes(base64.b64decode(found["data"][0]["b64_json"]))
    record = read_picture_record(path)
    assert record.fingerprint == Bundle(house.bundle).provenance.fingerprint
    with Pipeline.open(house.bundle, threads=1) as pipeline:
        (alone,) = pipeline.generate(
            PROMPT,
            seed=7,
            steps=4,
            guidance_scale=5.0,
            negative_prompt="a ring",
            emag_scale=1.7,
            emag_beta=0.9,
            emag_strength=0.5,
            emag_blocks=(4,),
        )
    assert np.abs(pixels(found["data"][0]["b64_json"]) - np.asarray(alone)).max() <= ONE_LEVEL
    alone.save(tmp_path / "alone.png")
    assert read_picture_record(tmp_path / "alone.png").request == record.request


def test_several_pictures_have_seeds_that_count_up(house: House) -> None:
    found = post(house, n=3, seed=20).json()["data"]
    assert [one["seed"] for one in found] == [20, 21, 22]
    assert len({one["b64_json"] for one in found}) == 3
    (again,) = post(house, seed=21).json()["data"]
    assert np.abs(pixels(again["b64_json"]) - pixels(found[1]["b64_json"])).max() <= ONE_LEVEL


def test_a_prompt_that_is_too_long_for_the_model_is_said(house: House) -> None:
    assert post(house).json()["emag"]["unseen"] is None
    unseen = post(house, prompt=f"{PROMPT} and " * 60, num_inference_steps=1).json()["emag"]["unseen"]
    assert "did not see" in unseen and PROMPT in unseen


def test_a_seed_is_drawn_where_none_is_given(house: House) -> None:
    seeds = {post(house, seed=None, num_inference_steps=1).json()["data"][0]["seed"] for _ in range(2)}
    assert len(seeds) == 2 and all(0 <= seed < 2**32 for seed in seeds)


@pytest.mark.parametrize(
    ("fields", "steps"),
    [
        ({"partial_images": 2, "num_inference_steps": 6}, [2, 4]),
        ({"emag": {"preview_every": 2}, "num_inference_steps": 6}, [2, 4]),
        ({"partial_images": 3, "num_inference_steps": 2}, [1]),
        ({}, []),
    ],
)
def test_a_stream_has_previews_and_then_the_picture(
    house: House, fields: dict[str, Any], steps: list[int]
) -> None:
    async def ask() -> list[tuple[str, dict[str, Any]]]:
        async with house.client() as client:
            return await events_of(client, **fields)

    events = run(ask())
    assert [name for name, _ in events] == ["image_generation.partial_image"] * len(steps) + [
        "image_generation.completed"
    ]
    assert [data["step"] for _, data in events[:-1]] == steps
    assert all(name == data["type"] for name, data in events)
    last = events[-1][1]
    assert pixels(last["b64_json"]).shape == (64, 64, 3) and last["seed"] == 1 and last["image_index"] == 0
    whole = post(house, num_inference_steps=fields.get("num_inference_steps", 4)).json()
    assert np.abs(pixels(last["b64_json"]) - pixels(whole["data"][0]["b64_json"])).max() <= ONE_LEVEL


def openai_client(house: House) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        api_key=KEY, base_url="http://server/v1", http_client=house.client(), max_retries=5
    )


def test_the_official_client_generates_streams_and_understands_errors(house: House) -> None:
    async def ask() -> None:
        client = openai_client(house)
        answer = await client.images.generate(
            prompt=PROMPT,
            n=2,
            size="64x64",
            extra_body={"seed": 3, "num_inference_steps": 2, "emag": {"guidance": "cfg"}},
        )
        assert answer.data and [one.model_extra for one in answer.data] == [{"seed": 3}, {"seed": 4}]
        stream = await client.images.generate(
            prompt=PROMPT, stream=True, partial_images=1, extra_body={"seed": 3, "num_inference_steps": 4}
        )
        kinds = [event.type async for event in stream]
        assert kinds == ["image_generation.partial_image", "image_generation.completed"]
        with pytest.raises(openai.BadRequestError) as refused:
            await client.images.generate(prompt=PROMPT, size="63x64")
        assert refused.value.param == "size" and refused.value.code == "invalid_value"
        with pytest.raises(openai.NotFoundError) as missing:
            await client.images.generate(prompt=PROMPT, model="dall-e-3")
        assert missing.value.param == "model"
        listed = await client.models.list()
        assert [model.id for model in listed.data] == [house.models[0].name]

    run(ask())


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"sed": 1}, "sed", "no field 'sed'"),
        ({"emag": {"sclae": 1}}, "emag.sclae", "no field 'emag.sclae'"),
        ({"prompt": None}, "prompt", "valid string"),
        ({"prompt": "  "}, "prompt", "is empty"),
        ({"prompt": "x" * 4001}, "prompt", "at most 4000"),
        ({"negative_prompt": "x" * 4001}, "negative_prompt", "at most 4000"),
        ({"n": 11}, "n", "at most 10"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"num_inference_steps": "4"}, "num_inference_steps", "valid integer"),
        ({"num_inference_steps": 101}, "num_inference_steps", "at most 100"),
        ({"size": "64"}, "size", "WIDTHxHEIGHT"),
        ({"size": "63x64"}, "size", "multiple of"),
        ({"size": "512x512"}, "size", "at most 16384 pixels"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"seed": 2**63 - 1, "n": 2}, "seed", "seeds count up"),
        ({"guidance_scale": "7"}, "guidance_scale", "valid number"),
        ({"emag": {"guidance": "hope"}}, "emag.guidance", "choose"),
        ({"emag": {"beta": 2.0}}, "emag.beta", "'emag.beta' is 2.0"),
        ({"emag": {"blocks": [99]}}, "emag.blocks", "block 99 is no candidate"),
        ({"emag": {"deadline": 0}}, "emag.deadline", "greater than 0"),
        ({"response_format": "url"}, "response_format", "b64_json"),
        ({"output_format": "webp"}, "output_format", "png"),
        ({"background": "transparent"}, "background", "opaque"),
        ({"partial_images": 2}, "partial_images", "'stream': true"),
        ({"partial_images": 4, "stream": True}, "partial_images", "less than or equal to 3"),
        ({"emag": {"preview_every": 2}}, "emag.preview_every", "'stream': true"),
    ],
)
def test_what_cannot_be_done_is_refused_with_its_field(
    house: House, fields: dict[str, Any], param: str, said: str
) -> None:
    answer = post(house, **fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param), error
    assert said in error["message"]
    for foreign in ("--", "`", str(house.bundle), "Traceback", "pydantic", "/"):
        assert foreign not in error["message"].replace("WIDTHxHEIGHT", "")


def test_every_answer_has_the_same_shape(house: House) -> None:
    async def ask() -> list[httpx2.Response]:
        async with house.client() as client:
            generations = "/v1/images/generations"
            return [
                await client.get("/nothing"),
                await client.get(generations),
                await client.post(generations, content=b"{"),
                await client.post(generations, content=b"[1]", headers={"content-type": "application/json"}),
                await client.post(generations, content=b"\xff\xfe"),
                await client.get("/v1/models/other"),
                await client.get("/v1/requests/unknown"),
                await client.get("/static/../app.py"),
                await client.get("/static/missing.js"),
            ]

    answers = run(ask())
    assert [answer.status_code for answer in answers] == [404, 405, 400, 400, 400, 404, 404, 404, 404]
    for answer in answers:
        assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
        assert answer.headers["x-request-id"] and answer.headers["x-content-type-options"] == "nosniff"


def test_fields_of_the_api_are_those_of_the_request(house: House) -> None:
    """The table of translations names fields that exist."""
    schema = house.app.openapi()["components"]["schemas"]
    top, own = schema["GenerationBody"]["properties"], schema["EmagOptions"]["properties"]
    for field in FIELDS.values():
        assert field in top or field.removeprefix("emag.") in own, field


def test_request_ids_are_the_clients_own_where_they_are_sane(house: House) -> None:
    async def ask() -> list[str]:
        async with house.client() as client:
            given = ("my-request_0001", "short", "x" * 65, "semi;colon-123")
            answers = [await client.get("/health/live", headers={"x-request-id": one}) for one in given]
            return [answer.headers["x-request-id"] for answer in answers]

    first, *others = run(ask())
    assert first == "my-request_0001" and all(one.startswith("req_") for one in others)


def test_keys_guard_everything_but_health_and_the_page(house: House) -> None:
    app = house.restricted(api_keys=(KEY, "another-key-of-24-letters"))
    paths = sorted(
        path
        for route in app.routes
        if (path := getattr(route, "path", ""))
        and "static" not in path
        and "GET" in (getattr(route, "methods", None) or ())
    )
    assert "/metrics" in paths and "/openapi.json" in paths

    async def ask() -> None:
        async with house.client(app=app) as client:
            for path in paths:
                shown = path.replace("{request_id}", "x").replace("{name}", house.models[0].name)
                open_ = path in ("/", "/health/live", "/health/ready")
                assert ((await client.get(shown)).status_code == 401) is not open_, path
            answer = await client.post("/v1/images/generations", json=body())
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
            assert answer.json()["error"]["code"] == "invalid_api_key"
            for wrong in (f"Basic {KEY}", KEY, f"Bearer {KEY}x", "Bearer", "Bearer schlüssel"):
                headers = {b"authorization": wrong.encode("latin-1")}
                assert (await client.get("/v1/models", headers=headers)).status_code == 401, wrong
            for right in (KEY, "another-key-of-24-letters"):
                headers = {b"authorization": f"bearer {right}".encode()}
                assert (await client.get("/v1/models", headers=headers)).status_code == 200

    run(ask())


def test_bodies_are_bounded_however_they_come(house: House) -> None:
    app = house.restricted(max_body=2000, body_seconds=0.3)

    async def chunks(pause: float) -> AsyncIterator[bytes]:
        for _ in range(10):
            yield b"x" * 300
            await asyncio.sleep(pause)

    async def ask() -> list[httpx2.Response]:
        async with house.client(app=app) as client:
            return [
                await client.post("/v1/images/generations", json=body(user="x" * 3000)),
                await client.post("/v1/images/generations", content=chunks(0.0)),
                await client.post("/v1/images/generations", content=chunks(0.1)),
            ]

    answers = run(ask())
    codes = [(answer.status_code, answer.json()["error"]["code"]) for answer in answers]
    assert codes == [(413, "body_too_large"), (413, "body_too_large"), (408, "body_too_slow")]


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


def test_figures_are_those_that_are_documented_and_move(house: House) -> None:
    def figures() -> dict[str, float]:
        lines = house.metrics.text().decode().splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[0] != "#"}

    name = house.models[0].name
    before = figures()
    assert post(house, n=2, emag={"guidance": "cfg"}).status_code == 200
    after = figures()
    grown = {key: after[key] - before.get(key, 0.0) for key in after}
    assert grown[f'emag_images_total{{guidance="cfg",model="{name}"}}'] == 2
    assert grown[f'emag_requests_total{{model="{name}",outcome="completed"}}'] == 1
    assert grown[f'emag_call_seconds_count{{model="{name}",phase="plain"}}'] >= 4
    assert grown[f'emag_call_images_sum{{model="{name}"}}'] == 8
    for histogram in ("request", "queue", "encode", "decode"):
        assert grown[f'emag_{histogram}_seconds_count{{model="{name}"}}'] >= 1
    told = {}
    for line in house.metrics.text().decode().splitlines():
        if line.startswith("# TYPE "):
            _, _, family, kind = line.split(" ")
            told[family] = kind
    assert told == METRICS


def test_the_log_has_a_line_a_request_and_no_prompt(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[dict[str, Any]] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(getattr(record, "facts", {}))  # type: ignore[method-assign]
    logger = logging.getLogger("emag.access")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        post(house)
        app = house.restricted(log_prompts=True)

        async def ask() -> None:
            async with house.client(app=app) as client:
                await client.post("/v1/images/generations", json=body())

        run(ask())
    finally:
        logger.removeHandler(handler)
    assert lines[0]["status"] == 200 and lines[0]["model"] == house.models[0].name
    assert PROMPT not in json.dumps(lines[0]) and lines[1]["prompt"] == PROMPT


def test_the_page_may_load_nothing_from_elsewhere(house: House) -> None:
    async def ask() -> httpx2.Response:
        async with house.client() as client:
            return await client.get("/")

    answer = run(ask())
    policy = answer.headers["content-security-policy"]
    assert answer.status_code == 200 and "default-src 'none'" in policy and "unsafe" not in policy


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"host": "0.0.0.0"}, "no key was given"),
        ({"host": "::"}, "no key was given"),
        ({"host": "example.org"}, "no key was given"),
        ({"api_keys": ("short",)}, "a key has 5 characters"),
        ({"port": 70000}, "`port` is 70000"),
        ({"max_images": 0}, "`max_images` is 0"),
        ({"deadline": 0}, "`deadline` is 0"),
        ({"log_format": "xml"}, "choose text or json"),
    ],
)
def test_a_server_that_cannot_be_trusted_does_not_start(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        ServerSettings(**settings)


def test_a_public_address_needs_a_key_or_a_word() -> None:
    for given in ({"api_keys": (KEY,)}, {"insecure": True}):
        assert ServerSettings(host="0.0.0.0", **given).host == "0.0.0.0"
    for host in ("127.0.0.1", "::1", "localhost"):
        assert not ServerSettings(host=host).api_keys


def test_keys_come_from_a_file_and_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# for the tests\n{KEY}\n\n")
    path.chmod(0o600)
    assert read_keys(path, {"EMAG_API_KEYS": f"one, {KEY} ,"}) == (("one", KEY), None)
    path.chmod(0o644)
    keys, warning = read_keys(path, {})
    assert keys == (KEY,) and warning is not None and "chmod 600" in warning
    path.write_text("# nothing\n")
    with pytest.raises(InputError, match="holds no key"):
        read_keys(path, {})
    with pytest.raises(InputError, match="cannot be read"):
        read_keys(tmp_path / "absent", {})


def test_two_bundles_of_one_name_are_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="two bundles are called"):
        open_models([tiny_bundle, tmp_path / tiny_bundle.name], EngineConfig(), BatchingOptions(), Metrics())


def test_every_figure_is_explained() -> None:
    guide = (Path(__file__).parent.parent / "docs" / "serving.md").read_text("utf-8")
    assert dict(re.findall(r"^\| `(emag_\w+)` \| (\w+) \|", guide, re.MULTILINE)) == METRICS
