"""An app and what is behind it, in this process: for tests over HTTP without a socket."""

import asyncio
import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from fastapi import FastAPI
from PIL import Image

from emag_export.engines.config import EngineConfig
from emag_export.runtime.batching.options import BatchingOptions
from emag_export.serve.app import State, create_app
from emag_export.serve.metrics import Metrics
from emag_export.serve.models import open_models
from emag_export.serve.settings import ServerSettings
from tests.serving import PROMPT

__all__ = ["KEY", "House", "body", "events_of", "house", "openai_client", "pixels", "post", "run"]

KEY = "k" * 32


class House:
    """One app, and what is behind it."""

    def __init__(self, bundle: Path, **settings: Any) -> None:
        self.metrics = Metrics()
        batching = BatchingOptions(images_per_call=4, live_images=4, threads=1, queue_images=6)
        self.models = open_models([bundle], EngineConfig(threads=1), batching, self.metrics)
        self.app = create_app(self.models, ServerSettings(**settings), self.metrics)
        self.batched = self.models[0].batched
        self.bundle = bundle

    @property
    def state(self) -> State:
        state: State = self.app.state.server
        return state

    def client(self, **options: Any) -> httpx2.AsyncClient:
        transport = httpx2.ASGITransport(app=options.pop("app", self.app))
        return httpx2.AsyncClient(transport=transport, base_url="http://server", timeout=60, **options)

    def restricted(self, **settings: Any) -> FastAPI:
        """The same models behind other settings."""
        metrics = Metrics()
        return create_app(self.models, ServerSettings(**settings), metrics)


@pytest.fixture(scope="module")
def house(tiny_bundle: Path) -> Iterator[House]:
    built = House(tiny_bundle, log_prompts=False)
    yield built
    built.batched.close()


def openai_client(house: House) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        api_key=KEY, base_url="http://server/v1", http_client=house.client(), max_retries=5
    )


def run(work: Any) -> Any:
    return asyncio.run(work)


def body(**fields: Any) -> dict[str, Any]:
    return {"prompt": PROMPT, "seed": 1, "num_inference_steps": 4, **fields}


def post(house: House, **fields: Any) -> httpx2.Response:
    async def ask() -> httpx2.Response:
        async with house.client() as client:
            return await client.post("/v1/images/generations", json=body(**fields))

    answer: httpx2.Response = run(ask())
    return answer


def pixels(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")).astype(int)


async def events_of(client: httpx2.AsyncClient, **fields: Any) -> list[tuple[str, dict[str, Any]]]:
    async with client.stream("POST", "/v1/images/generations", json=body(stream=True, **fields)) as answer:
        assert answer.status_code == 200, await answer.aread()
        assert answer.headers["content-type"].startswith("text/event-stream")
        text = (await answer.aread()).decode()
    events = []
    for block in text.strip().split("\n\n"):
        name, data = (line.partition(": ")[2] for line in block.splitlines())
        events.append((name, json.loads(data)))
    return events
