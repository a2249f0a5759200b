"""The exported repository in a real Triton Inference Server, on the loopback address."""

import io
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from PIL import Image

from benchmarks.serving.triton_server import (
    ENVIRONMENT,
    CannotInstallError,
    Triton,
    png_of,
    prepare,
    running_triton,
)
from emag_export.bundle import Bundle
from emag_export.engines.config import EngineConfig
from emag_export.runtime.pictures.metadata import read_picture_record
from emag_export.runtime.pipeline import Pipeline
from emag_export.serve.triton.export import export_repository
from tests.serving import wait_for

pytestmark = pytest.mark.triton

PROMPT = "a large red circle on a blue background"
ONE_LEVEL = 1


@pytest.fixture(scope="module")
def repository(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("triton") / "repository"
    export_repository(Bundle(tiny_bundle), folder, EngineConfig(threads=1))
    return folder


@pytest.fixture(scope="module")
def triton(repository: Path) -> Iterator[Triton]:
    try:
        installed = prepare()
    except CannotInstallError as error:
        pytest.skip(f"nvidia-pytriton cannot be installed: {error}")
    with running_triton(installed, repository) as running:
        yield running


def infer(triton: Triton, prompt: str, **fields: Any) -> np.ndarray | httpx2.Response:
    """A picture, or the answer that is none."""
    answer = triton.ask(prompt, **fields)
    if answer.status_code != 200:
        return answer
    return np.asarray(Image.open(io.BytesIO(png_of(answer))).convert("RGB")).astype(int)


def test_overlapping_requests_are_whole_and_right(triton: Triton, tiny_bundle: Path) -> None:
    wanted: list[dict[str, Any]] = [
        {"SEED": seed, "STEPS": (4, 12, 28)[seed % 3], "GUIDANCE": ("emag", "cfg")[seed % 2]}
        for seed in range(9)
    ]
    found: dict[int, Any] = {}
    clients = [
        threading.Thread(target=lambda n=n: found.update({n: infer(triton, PROMPT, **wanted[n])}))
        for n in range(len(wanted))
    ]
    for client in clients:
        client.start()
    bad = infer(triton, PROMPT, STEPS=0)
    empty = infer(triton, " ")
    for client in clients:
        client.join()
    assert isinstance(bad, httpx2.Response) and "0 denoising steps" in bad.text
    assert isinstance(empty, httpx2.Response) and "the PROMPT is empty" in empty.text
    assert {bad.status_code, empty.status_code} == {400}
    with Pipeline.open(tiny_bundle, threads=1) as pipeline:
        for number, given in enumerate(wanted):
            (alone,) = pipeline.generate(
                PROMPT,
                seed=int(given["SEED"]),
                steps=int(given["STEPS"]),
                guidance=str(given["GUIDANCE"]),
            )
            assert np.abs(found[number] - np.asarray(alone)).max() <= ONE_LEVEL


def test_the_client_in_the_repository_draws(triton: Triton, repository: Path, tmp_path: Path) -> None:
    """As docs/guides/triton.md starts it; only the port is another one."""
    code = (repository / "client.py").read_text("utf-8")
    assert "127.0.0.1:8000" in code
    here = code.replace("127.0.0.1:8000", triton.http.removeprefix("http://"))
    words = [str(ENVIRONMENT / "bin" / "python"), "-c", here, PROMPT, "picture.png"]
    subprocess.run(words, cwd=tmp_path, check=True, timeout=120)
    request = read_picture_record(tmp_path / "picture.png").request
    assert (request.prompt, request.seed) == (PROMPT, 1)


def test_requests_share_calls(triton: Triton) -> None:
    """Fewer executions than steps that were asked for; Triton itself batches equal sets of inputs only."""
    sets: tuple[dict[str, Any], ...] = (
        {},
        {"GUIDANCE": "cfg"},
        {"NEGATIVE_PROMPT": "blue"},
        {"EMAG_SCALE": 1.2},
    )
    before = triton.executions()
    clients = [
        threading.Thread(target=lambda s=seed: infer(triton, PROMPT, SEED=s, STEPS=20, **sets[s % 4]))
        for seed in range(8)
    ]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    assert triton.executions() - before < 8 * 20 / 2


# HTTP clients cannot cancel here: Triton finishes the pictures of those that have gone.
LEAVERS = """
import sys
import numpy as np
import tritonclient.grpc

client = tritonclient.grpc.InferenceServerClient(sys.argv[1])
calls = []
for seed in range(8):
    inputs = [
        tritonclient.grpc.InferInput("PROMPT", [1, 1], "BYTES"),
        tritonclient.grpc.InferInput("SEED", [1, 1], "INT64"),
        tritonclient.grpc.InferInput("STEPS", [1, 1], "INT32"),
    ]
    values = (np.array([[b"a circle"]], dtype=object), np.array([[seed]]), np.array([[100]], dtype=np.int32))
    for tensor, value in zip(inputs, values):
        tensor.set_data_from_numpy(value)
    calls.append(client.async_infer(sys.argv[2], inputs, lambda result, error: None))
print("asked", flush=True)
sys.stdin.readline()
for call in calls:
    call.cancel()
print("left", flush=True)
sys.stdin.readline()
"""


def test_clients_that_leave_keep_no_place(triton: Triton) -> None:
    """Triton does not tell the model of them; eight would hold all places for the rest of 100 steps."""
    before = triton.executions()
    words = [str(ENVIRONMENT / "bin" / "python"), "-c", LEAVERS, triton.grpc, triton.model]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as leavers:
        assert leavers.stdin is not None and leavers.stdout is not None
        assert leavers.stdout.readline() == "asked\n"
        wait_for(lambda: triton.executions() >= before + 3, "steps of all eight", 60)
        leavers.stdin.write("\n")
        leavers.stdin.flush()
        assert leavers.stdout.readline() == "left\n"
        left = triton.executions()
        assert isinstance(infer(triton, PROMPT, STEPS=2), np.ndarray)
        assert left - before < 60, "they left too late to hold a place"
        assert triton.executions() - left < 30
        leavers.stdin.write("\n")


def test_nobody_takes_all_of_the_server(triton: Triton) -> None:
    refused = infer(triton, PROMPT, STEPS=2**31 - 1)
    assert isinstance(refused, httpx2.Response) and "STEPS is 2147483647; give at most 100" in refused.text
