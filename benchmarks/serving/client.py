"""Sending requests at their time, whatever became of those before."""

import asyncio
import base64
import json
import time
from collections.abc import Sequence

import httpx2

from benchmarks.serving.traffic import Arrival, Served

__all__ = ["send"]

_PNG = b"\x89PNG\r\n\x1a\n"


def send(url: str, arrivals: Sequence[Arrival], *, previews: bool = False) -> list[Served]:
    """Send requests when they are due and wait for all answers.

    Args:
        url: Of the server.
        arrivals: In the order of their time.
        previews: Stream every request with one preview.

    Raises:
        RuntimeError: If an answer is no picture.
    """
    return asyncio.run(_send_all(url, arrivals, previews))


async def _send_all(url: str, arrivals: Sequence[Arrival], previews: bool) -> list[Served]:
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=64)
    async with httpx2.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        begin = time.perf_counter()
        ask = _streamed if previews else _asked
        return list(await asyncio.gather(*(ask(client, arrival, begin) for arrival in arrivals)))


def _body(arrival: Arrival) -> dict[str, object]:
    return {
        "prompt": arrival.prompt,
        "seed": arrival.seed,
        "num_inference_steps": arrival.steps,
        "emag": {"guidance": arrival.guidance},
    }


async def _asked(client: httpx2.AsyncClient, arrival: Arrival, begin: float) -> Served:
    await asyncio.sleep(max(0.0, arrival.at - (time.perf_counter() - begin)))
    answer = await client.post("/v1/images/generations", json=_body(arrival))
    ended = time.perf_counter() - begin
    if answer.status_code != 200:
        raise RuntimeError(f"status {answer.status_code}: {answer.text}")
    _check(answer.json()["data"][0]["b64_json"])
    return Served(arrival=arrival, seconds=ended - arrival.at)


async def _streamed(client: httpx2.AsyncClient, arrival: Arrival, begin: float) -> Served:
    await asyncio.sleep(max(0.0, arrival.at - (time.perf_counter() - begin)))
    body = {**_body(arrival), "stream": True, "partial_images": 1}
    first: float | None = None
    async with client.stream("POST", "/v1/images/generations", json=body) as answer:
        async for line in answer.aiter_lines():
            if not line.startswith("data: "):
                continue
            event, now = json.loads(line.removeprefix("data: ")), time.perf_counter() - begin
            if event.get("type") == "image_generation.completed":
                _check(event["b64_json"])
                preview = None if first is None else first - arrival.at
                return Served(arrival=arrival, seconds=now - arrival.at, first_preview=preview)
            first = now if first is None else first
    raise RuntimeError(f"the stream of seed {arrival.seed} ended without a picture")


def _check(picture: str) -> None:
    if not base64.b64decode(picture).startswith(_PNG):
        raise RuntimeError("an answer holds no PNG")
