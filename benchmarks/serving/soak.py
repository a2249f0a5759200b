"""Minutes of mixed load on a server whose engine fails now and then: ``make soak``.

Clients ask, stream, leave, cancel and make mistakes at random. Nothing may be lost: every request gets an
answer that it should get. Nothing may be wrong: every picture is compared with the one made alone. Memory may
not grow: the slope of the server's own memory is printed with its 95 % bootstrap interval.
Exits 1 if something was lost or wrong.
"""

import argparse
import asyncio
import base64
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from PIL import Image
from rich.console import Console

from benchmarks.results import FOLDER, write_results
from benchmarks.serving.servers import free_port, wait_until_ready
from emag_export.bench.memory import host_memory
from emag_export.runtime.guidance.rules import GUIDANCES
from emag_export.runtime.pipeline import Pipeline
from emag_export.tiny_sd3.captions import caption
from emag_export.tiny_sd3.scenes import sample_scene

__all__ = ["RESULTS", "axes", "main", "slope"]

RESULTS = FOLDER / "soak.json"
_CLIENTS = 8
_POOL = 48
"""Different requests, each drawn alone beforehand."""
_FAULTS = 0.002
"""Share of engine calls that fail."""
_ACTIONS = {"ask": 60, "stream": 15, "leave": 10, "cancel": 8, "mistake": 7}
"""What a client does, and how often out of a hundred."""
_ONE_LEVEL = 1
"""Of 255: larger calls add up in another order."""
_SETTLING = 0.5
"""Share of the time before memory counts: in it buffers of all sizes are made, and the allocator's arenas."""


def axes() -> dict[str, Any]:
    """What is varied."""
    return {"clients": _CLIENTS, "actions": _ACTIONS, "faults": _FAULTS}


@dataclass(kw_only=True)
class Soak:
    """What is asked for, what it must look like, and what happened."""

    url: str
    bodies: list[dict[str, Any]]
    pictures: list[np.ndarray]
    until: float
    counts: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def check(self, number: int, text: str) -> None:
        """Hold a picture against the one that was made alone."""
        found = np.asarray(Image.open(BytesIO(base64.b64decode(text))).convert("RGB")).astype(int)
        if np.abs(found - self.pictures[number]).max() > _ONE_LEVEL:
            self.wrong.append(f"request {number}")
        self.counts["pictures compared"] += 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Soak a server and judge."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--bundle", type=Path, default=Path("out/bench/tiny"))
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    console = Console(highlight=False)
    build = ("build", "--model", "tiny-sd3", "-o", str(given.bundle))
    subprocess.run([sys.executable, "-m", "emag_export.cli.main", *build], check=True)
    bodies = _bodies(random.Random(0))
    pictures = _alone(given.bundle, bodies)
    console.print(f"{len(bodies)} different requests drawn alone; {given.minutes:g} minutes of load follow")
    port = free_port()
    words = [sys.executable, "-m", "benchmarks.serving.faulty_server", str(given.bundle)]
    words += ["--port", str(port), "--max-queue", "24"]
    process = subprocess.Popen(words, env={**os.environ, "FAULTS": str(_FAULTS)}, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready(process, url)
        soak = Soak(url=url, bodies=bodies, pictures=pictures, until=time.monotonic() + 60 * given.minutes)
        memory = asyncio.run(_soak(soak, process.pid, console))
        process.terminate()
        ended = process.wait(60)
    finally:
        process.kill()
    rate, low, high = slope(memory)
    console.print(dict(soak.counts))
    console.print(f"lost {len(soak.lost)}, wrong {len(soak.wrong)}, exit {ended}")
    size = memory[-1][1] / 1e6
    console.print(f"own memory {size:.0f} MB, slope {rate:+.3f} MB a minute [{low:+.3f}, {high:+.3f}]")
    for text in (*soak.lost[:10], *soak.wrong[:10]):
        console.print(text, style="red", markup=False)
    write_results(
        given.output,
        command="make soak",
        axes=axes(),
        minutes=given.minutes,
        counts=dict(soak.counts),
        lost=len(soak.lost),
        wrong=len(soak.wrong),
        memory={
            "slope_mb_per_minute": rate,
            "interval": [low, high],
            "mb_every_half_minute": [round(size / 1e6, 1) for _, size in memory[::15]],
        },
    )
    return int(bool(soak.lost or soak.wrong or ended))


def _bodies(draw: random.Random) -> list[dict[str, Any]]:
    scenes = np.random.default_rng(0)
    return [
        {
            "prompt": caption(sample_scene(scenes)),
            "seed": number,
            "num_inference_steps": draw.randint(2, 12),
            "guidance_scale": round(draw.uniform(1, 7), 2),
            "emag": {"guidance": draw.choice(list(GUIDANCES)), "scale": round(draw.uniform(1, 2), 2)},
        }
        for number in range(_POOL)
    ]


def _alone(bundle: Path, bodies: Sequence[dict[str, Any]]) -> list[np.ndarray]:
    with Pipeline.open(bundle) as pipeline:
        return [
            np.asarray(
                pipeline.generate(
                    body["prompt"],
                    seed=body["seed"],
                    steps=body["num_inference_steps"],
                    guidance=body["emag"]["guidance"],
                    guidance_scale=body["guidance_scale"],
                    emag_scale=body["emag"]["scale"],
                )[0]
            ).astype(int)
            for body in bodies
        ]


async def _soak(soak: Soak, pid: int, console: Console) -> list[tuple[float, float]]:
    """Load until the time is over; own memory of the server by minutes."""
    begin, memory = time.monotonic(), list[tuple[float, float]]()
    async with httpx2.AsyncClient(base_url=soak.url, timeout=120) as client:
        clients = [asyncio.ensure_future(_client(soak, client, random.Random(n))) for n in range(_CLIENTS)]
        while time.monotonic() < soak.until:
            await asyncio.sleep(2)
            memory.append(((time.monotonic() - begin) / 60, host_memory(pid).own or 0))
            if len(memory) % 30 == 0:
                console.print(f"{memory[-1][0]:.0f} min: {dict(soak.counts)}, {memory[-1][1] / 1e6:.0f} MB")
        await asyncio.gather(*clients)
    return memory


async def _client(soak: Soak, client: httpx2.AsyncClient, draw: random.Random) -> None:
    actions = {"ask": _ask, "stream": _stream, "leave": _leave, "cancel": _cancel, "mistake": _mistake}
    while time.monotonic() < soak.until:
        (action,) = draw.choices(list(_ACTIONS), list(_ACTIONS.values()))
        number = draw.randrange(len(soak.bodies))
        try:
            await actions[action](soak, client, number)
            soak.counts[action] += 1
        except (httpx2.HTTPError, AssertionError, KeyError, ValueError) as error:
            soak.lost.append(f"{action} of request {number}: {type(error).__name__} {error}")
        await asyncio.sleep(draw.uniform(0, 0.2))


async def _answered(soak: Soak, client: httpx2.AsyncClient, body: dict[str, Any], **options: Any) -> Any:
    """An answer, once the server neither refuses for want of room nor loses the call to an injected fault."""
    while True:
        answer = await client.post("/v1/images/generations", json=body, **options)
        if answer.status_code in (429, 503):
            assert 1 <= int(answer.headers["retry-after"]) <= 120
            soak.counts["refused, came again"] += 1
            await asyncio.sleep(0.5)
        elif answer.status_code == 500 and answer.json()["error"]["code"] == "engine_failure":
            soak.counts["engine failures met"] += 1
        else:
            return answer


async def _ask(soak: Soak, client: httpx2.AsyncClient, number: int) -> None:
    answer = await _answered(soak, client, soak.bodies[number])
    assert answer.status_code == 200, answer.text
    soak.check(number, answer.json()["data"][0]["b64_json"])


async def _stream(soak: Soak, client: httpx2.AsyncClient, number: int) -> None:
    body = {**soak.bodies[number], "stream": True, "partial_images": 2}
    while True:
        async with client.stream("POST", "/v1/images/generations", json=body) as answer:
            if answer.status_code in (429, 503):
                await answer.aread()
                await asyncio.sleep(0.5)
                continue
            assert answer.status_code == 200, await answer.aread()
            lines = [line async for line in answer.aiter_lines() if line.startswith("data: ")]
        last = json.loads(lines[-1].removeprefix("data: "))
        if last.get("error", {}).get("code") == "engine_failure":
            soak.counts["engine failures met"] += 1
            continue
        soak.check(number, last["b64_json"])
        return


async def _leave(soak: Soak, client: httpx2.AsyncClient, number: int) -> None:
    body = {**soak.bodies[number], "num_inference_steps": 60, "stream": True, "emag": {"preview_every": 2}}
    async with client.stream("POST", "/v1/images/generations", json=body) as answer:
        if answer.status_code == 200:
            async for line in answer.aiter_lines():
                if line.startswith("data: "):
                    return


async def _cancel(soak: Soak, client: httpx2.AsyncClient, number: int) -> None:
    name = f"soak-{number}-{time.monotonic_ns()}"
    body = {**soak.bodies[number], "num_inference_steps": 80}
    asked = asyncio.ensure_future(_answered(soak, client, body, headers={"x-request-id": name}))
    await asyncio.sleep(0.2)
    await client.delete(f"/v1/requests/{name}")
    answer = await asked
    assert answer.status_code in (200, 409), answer.text


async def _mistake(soak: Soak, client: httpx2.AsyncClient, number: int) -> None:
    answer = await client.post("/v1/images/generations", json={**soak.bodies[number], "size": "63x1"})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "size", answer.text


def slope(memory: Sequence[tuple[float, float]], draws: int = 1000) -> tuple[float, float, float]:
    """MB a minute with its 95 % interval, from a bootstrap over blocks, as neighbours resemble each other.

    Args:
        memory: (minutes, bytes), evenly spaced.
        draws: Of the bootstrap.
    """
    kept = np.asarray(memory[int(len(memory) * _SETTLING) :])
    minutes, sizes = kept[:, 0], kept[:, 1] / 1e6
    fit = np.polyfit(minutes, sizes, 1)
    rest = sizes - np.polyval(fit, minutes)
    length = max(1, len(rest) // 10)
    random_state = np.random.default_rng(0)
    found = []
    for _ in range(draws):
        starts = random_state.integers(0, len(rest) - length + 1, size=-(-len(rest) // length))
        noise = np.concatenate([rest[start : start + length] for start in starts])[: len(rest)]
        found.append(np.polyfit(minutes, np.polyval(fit, minutes) + noise, 1)[0])
    low, high = np.quantile(found, (0.025, 0.975))
    return float(fit[0]), float(low), float(high)


if __name__ == "__main__":
    sys.exit(main())
