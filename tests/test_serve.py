"""The server over HTTP in this process: pictures, streams, refusals, keys."""

import asyncio
import base64
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest

from emag_export.bundle import Bundle
from emag_export.runtime.pictures.metadata import read_picture_record
from emag_export.runtime.pipeline import Pipeline
from emag_export.serve.errors import FIELDS
from tests.house import KEY, House, body, events_of, house, openai_client, pixels, post, run
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
