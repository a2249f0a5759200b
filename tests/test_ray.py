"""Serving from a local Ray cluster: pictures, streams, refusals, replicas that die, the end."""

import base64
import io
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import psutil  # type: ignore[import-untyped]
import pytest
import yaml
from PIL import Image

from emag_export.runtime.pipeline import Pipeline
from tests.serving import PROMPT, Running, running_server, wait_for

pytest.importorskip("ray")
pytestmark = [pytest.mark.ray, pytest.mark.slow]

KEY = "k" * 32
# Of 255. Images share calls here; measured on this model: no pixel differs.
ONE_LEVEL = 1
ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "deploy/ray/serve.yaml"
STEPS = 12
NEW_REPLICA_SECONDS = 90


@contextmanager
def on_ray(bundle: Path, *options: str) -> Iterator[Running]:
    """A server on a cluster of its own, ended as an operator ends it: Ray cleans up after itself then."""
    environment = {**os.environ, "EMAG_API_KEYS": KEY}
    with running_server(bundle, "--ray", *options, environment=environment) as server:
        try:
            yield server
        finally:
            server.process.terminate()
            server.process.wait(60)


@pytest.fixture(scope="module")
def server(tiny_bundle: Path) -> Iterator[Running]:
    """Started as the guide says."""
    text = (ROOT / "docs" / "guides" / "ray.md").read_text("utf-8")
    (words,) = re.findall(r"^emag-export serve bundle --ray (--replicas .*)$", text, re.MULTILINE)
    with on_ray(tiny_bundle, *shlex.split(words), "--max-queue", "16") as running:
        yield running


@pytest.fixture(scope="module")
def alone(tiny_bundle: Path) -> Iterator[Callable[[int, int], Any]]:
    """(seed, steps) to the pixels of that picture made by itself."""
    with Pipeline.open(tiny_bundle, threads=1) as pipeline:
        yield lambda seed, steps: np.asarray(pipeline.generate(PROMPT, seed=seed, steps=steps)[0], np.int16)


def client_of(server: Running, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"{server.url}/v1", api_key=KEY, timeout=60, **{"max_retries": 0, **options}
    )


def get(server: Running, path: str) -> httpx2.Response:
    return httpx2.get(f"{server.url}{path}", headers={"Authorization": f"Bearer {KEY}"}, timeout=30)


def figures(server: Running, name: str) -> dict[str, float]:
    """Replica to a figure of it, summed over the other labels."""
    found: dict[str, float] = {}
    for labels, value in re.findall(rf"^{name}\{{(.*)\}} (\S+)$", get(server, "/metrics").text, re.MULTILINE):
        replica = re.search('replica="(.*?)"', labels)
        assert replica is not None
        found[replica[1]] = found.get(replica[1], 0) + float(value)
    return found


def pixels_of(text: str) -> Any:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))), np.int16)


def replica_processes(server: Running) -> list[psutil.Process]:
    """Those with an engine. Ray writes what a process is into its command line."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    return [child for child in children if "ServeReplica:emag-export:model-" in " ".join(child.cmdline())]


def error_of(response: httpx2.Response) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_pictures_are_those_of_the_pipeline(server: Running, alone: Callable[[int, int], Any]) -> None:
    client = client_of(server)
    made = client.images.generate(
        prompt=PROMPT, n=2, extra_body={"seed": 3, "num_inference_steps": STEPS, "model": None}
    )
    assert made.data is not None
    for image, seed in zip(made.data, (3, 4), strict=True):
        assert image.b64_json is not None
        assert np.abs(pixels_of(image.b64_json) - alone(seed, STEPS)).max() <= ONE_LEVEL
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id).id == model.id


def test_a_stream_comes_while_it_is_drawn(server: Running, alone: Callable[[int, int], Any]) -> None:
    began, at = time.monotonic(), []
    stream = client_of(server).images.generate(
        prompt=PROMPT, stream=True, partial_images=2, extra_body={"seed": 5, "num_inference_steps": 60}
    )
    events = []
    for event in stream:
        events.append(event)
        at.append(time.monotonic() - began)
    assert [event.type.rpartition(".")[2] for event in events] == [
        "partial_image",
        "partial_image",
        "completed",
    ]
    assert at[0] < 0.75 * at[-1], "the first preview came with the last picture"
    assert np.abs(pixels_of(events[-1].b64_json) - alone(5, 60)).max() <= ONE_LEVEL


def test_refusals_have_the_shape_of_openai(server: Running) -> None:
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0).models.list()
    with pytest.raises(openai.BadRequestError) as caught:
        client_of(server).images.generate(prompt=PROMPT, extra_body={"num_inference_steps": 0})
    assert caught.value.param == "num_inference_steps"
    with pytest.raises(openai.NotFoundError, match="there is no model 'another'"):
        client_of(server).images.generate(prompt=PROMPT, model="another")
    assert error_of(get(server, "/v1/requests/unknown-one"))["code"] == "request_not_found"
    ids = get(server, "/v1/models").headers.get_list("x-request-id")
    assert len(ids) == 1


def test_too_much_at_once_is_refused_with_a_time_to_come_back(server: Running) -> None:
    def ask(seed: int) -> httpx2.Response:
        return server.generate(key=KEY, n=10, seed=seed, num_inference_steps=STEPS)

    with ThreadPoolExecutor(10) as pool:  # 100 pictures; two replicas have places for 2 × (4 + 16)
        responses = list(pool.map(ask, range(0, 100, 10)))
    refused = [response for response in responses if response.status_code != 200]
    assert 0 < len(refused) < 10
    for response in refused:
        assert (response.status_code, error_of(response)["type"]) == (429, "rate_limit_error")
        assert int(response.headers["retry-after"]) >= 1
    # The official client comes back by itself.
    with ThreadPoolExecutor(6) as pool:
        patient = client_of(server, max_retries=8)
        asked = [
            pool.submit(patient.images.generate, prompt=PROMPT, n=10, extra_body={"num_inference_steps": 4})
            for _ in range(6)
        ]
        assert all(len(one.result().data or ()) == 10 for one in asked)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_rows(server: Running, stream: bool) -> None:
    request_id = f"leaving-{stream}"
    body = {"prompt": PROMPT, "n": 4, "num_inference_steps": 100, "stream": stream}
    headers = {"Authorization": f"Bearer {KEY}", "x-request-id": request_id}
    with httpx2.Client(base_url=server.url, headers=headers, timeout=1.0) as client:
        if stream:
            shown = {**body, "emag": {"preview_every": 1}}
            with client.stream("POST", "/v1/images/generations", json=shown, timeout=30) as response:
                next(response.iter_lines())
        else:
            with pytest.raises(httpx2.ReadTimeout):
                client.post("/v1/images/generations", json=body)
    state = wait_for(
        lambda: (
            (found := get(server, f"/v1/requests/{request_id}").json())["status"] == "cancelled" and found
        ),
        "the end of what nobody waits for",
        5,
    )
    assert state["step"] < state["steps"] == 100
    wait_for(lambda: not sum(figures(server, "emag_live_images").values()), "free rows", 5)


def test_a_replica_that_is_killed_harms_only_what_it_had(
    server: Running, alone: Callable[[int, int], Any]
) -> None:
    wait_for(lambda: len(figures(server, "emag_ready")) == 2, "two replicas")
    before = set(figures(server, "emag_ready"))
    expected = {seed: alone(seed, STEPS) for seed in range(40, 52)}
    with ThreadPoolExecutor(len(expected)) as pool:
        asked = {
            seed: pool.submit(server.generate, key=KEY, seed=seed, num_inference_steps=STEPS)
            for seed in expected
        }
        # Each has more than it can denoise at once, so neither is about to finish.
        wait_for(lambda: min(figures(server, "emag_live_images").values()) == 4, "two busy replicas")
        replica_processes(server)[0].send_signal(signal.SIGKILL)
        responses = {seed: one.result() for seed, one in asked.items()}
    whole = {seed: response for seed, response in responses.items() if response.status_code == 200}
    for seed, response in whole.items():
        (data,) = response.json()["data"]
        assert np.abs(pixels_of(data["b64_json"]) - expected[seed]).max() <= ONE_LEVEL
    for response in responses.values():
        if response.status_code != 200:
            assert (response.status_code, error_of(response)["code"]) == (503, "replica_lost")
            assert "retry-after" in response.headers
    # At least half were the other's; the rest went there, too, unless they could not be repeated.
    assert len(whole) >= len(expected) // 2
    wait_for(lambda: len(figures(server, "emag_ready")) == 2, "a new replica", NEW_REPLICA_SECONDS)
    after = set(figures(server, "emag_ready"))
    assert len(after & before) == 1
    assert sum(figures(server, "emag_ready").values()) == 2


def test_a_stream_whose_replica_is_killed_ends_with_an_error(server: Running) -> None:
    wait_for(lambda: len(figures(server, "emag_ready")) == 2, "two replicas", NEW_REPLICA_SECONDS)
    stream = client_of(server).images.generate(
        prompt=PROMPT, stream=True, partial_images=3, extra_body={"num_inference_steps": 100}
    )
    assert next(iter(stream)).type == "image_generation.partial_image"
    for process in replica_processes(server):
        process.send_signal(signal.SIGKILL)
    with pytest.raises(openai.APIError, match="was lost"):
        list(stream)
    refused = server.generate(key=KEY)
    assert refused.status_code == 503
    assert error_of(refused)["type"] == "service_unavailable"
    assert get(server, "/health/ready").status_code == 503
    assert get(server, "/health/live").status_code == 200


def test_sigterm_finishes_what_is_there(tiny_bundle: Path, alone: Callable[[int, int], Any]) -> None:
    with on_ray(tiny_bundle, "--replicas", "1") as server, ThreadPoolExecutor(3) as pool:
        asked = [
            pool.submit(server.generate, key=KEY, seed=seed, num_inference_steps=100) for seed in (1, 2, 3)
        ]
        wait_for(
            lambda: sum(figures(server, "emag_live_images").values()) == 3, "three pictures on their way"
        )
        server.process.terminate()
        late = wait_for(
            lambda: (answer := server.generate(key=KEY)).status_code != 200 and answer, "a server that drains"
        )
        assert (late.status_code, error_of(late)["code"]) == (503, "draining")
        for seed, one in zip((1, 2, 3), asked, strict=True):
            (data,) = one.result().json()["data"]
            assert np.abs(pixels_of(data["b64_json"]) - alone(seed, 100)).max() <= ONE_LEVEL
        family = psutil.Process(server.process.pid).children(recursive=True)
        assert server.process.wait(30) == 0
        _, alive = psutil.wait_procs(family, timeout=10)
        assert not alive


def test_serve_yaml_scales_with_the_images_that_wait(tiny_bundle: Path, tmp_path: Path) -> None:
    """``serve run`` of the example, on the CPU; a second replica comes once one has more than its fill."""
    config = yaml.safe_load(EXAMPLE.read_text("utf-8"))
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    keys = tmp_path / "keys"
    keys.write_text(KEY, "utf-8")
    config |= {"proxy_location": "HeadOnly", "http_options": {"host": "127.0.0.1", "port": port}}
    config["applications"][0]["args"] |= {
        "bundles": [str(tiny_bundle)],
        "api_key_file": str(keys),
        "engine": {"threads": 1},
        "batching": {"images_per_call": 4, "live_images": 4},
        "ray": {"replicas": "auto", "max_replicas": 2},
    }
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(config), "utf-8")
    command = [str(Path(sys.executable).with_name("serve")), "run", str(tmp_path / "serve.yaml")]
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "t" * 64}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, text=True)
    server = Running(process=process, url=f"http://127.0.0.1:{port}")
    try:
        wait_for(lambda: _ready(server), "an application that is ready", 90)
        assert len(figures(server, "emag_ready")) == 1

        def more() -> bool:
            for answer in [server.generate(key=KEY, n=10, num_inference_steps=28) for _ in range(2)]:
                assert answer.status_code == 200
            return len(figures(server, "emag_ready")) == 2

        with ThreadPoolExecutor(2) as pool:
            assert all(pool.map(lambda _: wait_for(more, "a second replica", 120), range(2)))
    finally:
        process.terminate()
        process.wait(60)


def _ready(server: Running) -> bool:
    try:
        return get(server, "/health/ready").status_code == 200
    except httpx2.HTTPError:
        return False
