"""Real servers in processes of their own: clients that leave, garbage, signals, kills and restarts."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import pytest

from emag_export.runtime.pictures.metadata import read_picture_record
from tests.serving import PROMPT, Running, running_server, wait_for

KEY = "k" * 32
CONNECTIONS = 1000


@pytest.fixture(scope="module")
def server(tiny_bundle: Path) -> Iterator[Running]:
    with running_server(tiny_bundle, "--max-queue", "20") as running:
        yield running


def address(server: Running) -> tuple[str, int]:
    parts = urlsplit(server.url)
    assert parts.hostname is not None and parts.port is not None
    return parts.hostname, parts.port


def long_request(**fields: object) -> bytes:
    body = json.dumps({"prompt": PROMPT, "num_inference_steps": 100, **fields}).encode()
    head = (
        "POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "picture"])
def test_a_client_that_leaves_frees_its_rows(server: Running, stream: bool) -> None:
    before = server.figure("emag_call_seconds_count")
    extra = {"stream": True, "emag": {"preview_every": 1}} if stream else {}
    with socket.create_connection(address(server)) as client:
        client.sendall(long_request(**extra))
        wait_for(lambda: server.figure("emag_call_seconds_count") > before + 3, "some steps")
        if stream:
            assert b"image_generation.partial_image" in client.recv(1 << 16) + client.recv(1 << 16)
    left = time.monotonic()
    wait_for(lambda: server.figure("emag_live_images") == 0, "free rows", 5)
    assert time.monotonic() - left < 1.0, "a hundred steps would have taken longer"
    assert server.figure('emag_requests_total{model="tiny-bundle",outcome="cancelled"}') >= 1


def test_garbage_harms_nobody(server: Running) -> None:
    half = long_request()[:-10]
    for rubbish in (b"\x00\xff" * 500, b"GET\r\n\r\n", b"POST / HTTP/9.9\r\n\r\n", half, b"A" * 200_000):
        with socket.create_connection(address(server)) as client:
            client.settimeout(0.3)
            with suppress(OSError):
                client.sendall(rubbish)
                client.recv(1000)
    assert server.generate().status_code == 200
    assert not [line for line in server.log if "Traceback" in line]


def test_a_thousand_connections_are_answered(server: Running) -> None:
    clients = [socket.create_connection(address(server)) for _ in range(CONNECTIONS)]
    try:
        for client in clients:
            client.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        answers = []
        for client in clients:
            client.settimeout(20)
            answers.append(client.recv(1000).split(b"\r\n", 1)[0])
        assert answers == [b"HTTP/1.1 200 OK"] * CONNECTIONS
        assert server.generate().status_code == 200, "and pictures are drawn meanwhile"
    finally:
        for client in clients:
            client.close()


def test_a_signal_under_load_finishes_what_is_there(tiny_bundle: Path) -> None:
    with running_server(tiny_bundle, "--log-format", "json") as server:
        answers: list[httpx2.Response] = []
        clients = [
            threading.Thread(
                target=lambda seed=seed: answers.append(server.generate(seed=seed, num_inference_steps=60))
            )
            for seed in range(6)
        ]
        for client in clients:
            client.start()
        wait_for(lambda: server.figure("emag_live_images") == 4, "load")
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: httpx2.get(f"{server.url}/health/ready").status_code == 503, "draining")
        refused = server.generate()
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining"
        for client in clients:
            client.join()
        assert [answer.status_code for answer in answers] == [200] * 6
        assert server.process.wait(20) == 0
        lines = [json.loads(line) for line in server.log if line.startswith("{")]
        assert sum(line.get("status") == 200 and line.get("images") == 1 for line in lines) == 6
        assert not any(PROMPT in line for line in server.log)


def test_a_second_signal_ends_at_once_and_a_killed_server_comes_back(tiny_bundle: Path) -> None:
    with running_server(tiny_bundle) as server:
        asked = threading.Thread(target=lambda: _ignore(server))
        asked.start()
        wait_for(lambda: server.figure("emag_live_images"), "load")
        for _ in range(2):
            server.process.send_signal(signal.SIGINT)
            time.sleep(0.3)
        assert server.process.wait(10) is not None
        asked.join()
        port = str(address(server)[1])
    for _ in range(2):  # killed, and started again at the same port
        with running_server(tiny_bundle, "--port", port) as again:
            assert again.generate(num_inference_steps=1).status_code == 200


def _ignore(server: Running) -> None:
    with suppress(httpx2.TransportError):
        server.generate(num_inference_steps=100, n=4)


def test_a_key_file_guards_a_server(tiny_bundle: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"{KEY}\n")
    keys.chmod(0o600)
    with running_server(tiny_bundle, "--host", "0.0.0.0", "--api-key-file", str(keys)) as server:
        assert server.generate(num_inference_steps=1).status_code == 401
        assert server.generate(num_inference_steps=1, key=KEY).status_code == 200
        assert not any(KEY in line for line in server.log)


def test_a_server_that_cannot_listen_says_why(tiny_bundle: Path, server: Running) -> None:
    port = str(address(server)[1])
    for words, said in (
        (["--host", "0.0.0.0"], "no key was given: give --api-key-file"),
        (["--port", port], f"127.0.0.1:{port} cannot be listened at"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "emag_export.cli.main", "serve", str(tiny_bundle), *words],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={**os.environ, "COLUMNS": "400"},
        )
        assert done.returncode == 2 and said in done.stderr, done.stderr


def test_the_commands_of_the_documents_run(server: Running, tmp_path: Path) -> None:
    """The curl of the guide, and the example with the official client."""
    root = Path(__file__).parent.parent
    text = (root / "docs" / "guides" / "serving.md").read_text("utf-8")
    (command,) = re.findall(r"^\$ (curl .*?> (?:\S+\.png))$", text, re.DOTALL | re.MULTILINE)
    here = command.replace("http://127.0.0.1:8000", server.url).replace("python -c", f"{sys.executable} -c")
    subprocess.run(here, shell=True, cwd=tmp_path, check=True, timeout=60)
    assert read_picture_record(tmp_path / "served.png").request.seed == 1
    environment = {**os.environ, "OPENAI_BASE_URL": f"{server.url}/v1", "OPENAI_API_KEY": KEY}
    example = [sys.executable, str(root / "examples" / "openai_client.py")]
    subprocess.run(example, cwd=tmp_path, env=environment, check=True, timeout=60)
    drawn = {path.name for path in (tmp_path / "out").iterdir()}
    assert drawn == {"picture-0.png", "picture-1.png", "preview-0.png", "preview-1.png", "streamed.png"}
    first, streamed = (
        read_picture_record(tmp_path / "out" / f"{name}.png").request for name in ("picture-0", "streamed")
    )
    assert first == streamed
