"""The exported repository in a real Triton Inference Server, on the loopback address.

The server is the one inside the wheel ``nvidia-pytriton``, in an environment of its own that is made once and
kept in ``out/``: its python backend needs numpy 1.
"""

import io
import os
import shutil
import struct
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from PIL import Image

from benchmarks.serving.servers import free_port
from emag_export.bundle import Bundle
from emag_export.engines.config import EngineConfig
from emag_export.runtime.pictures.metadata import read_picture_record
from emag_export.runtime.pipeline import Pipeline
from emag_export.serve.triton.export import export_repository
from emag_export.serve.triton.fields import FIELDS
from tests.serving import wait_for

pytestmark = pytest.mark.triton

ROOT = Path(__file__).parent.parent
ENVIRONMENT = ROOT / "out" / "triton-env"
PROMPT = "a large red circle on a blue background"
RUNTIME = ("diffusers", "transformers", "jaxtyping", "pydantic", "psutil", "safetensors", "pillow", "click")
ONE_LEVEL = 1


@pytest.fixture(scope="module")
def triton() -> Path:
    """The folder of the server, with emag-export importable beside it."""
    python = ENVIRONMENT / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    if not (ENVIRONMENT / ".ready").exists():
        shutil.rmtree(ENVIRONMENT, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
        import torch

        # The same torch as here: any other might be a build for GPUs, with gigabytes of libraries.
        subprocess.run([*pip, f"torch=={torch.__version__.partition('+')[0]}"], check=True)
        wanted = ["numpy<2", "nvidia-pytriton", "onnxruntime>=1.24", *RUNTIME]
        done = subprocess.run([*pip, *wanted], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"nvidia-pytriton cannot be installed: {done.stderr.strip().splitlines()[-1]}")
        (ENVIRONMENT / ".ready").touch()
    # Without its requirements: they name numpy 2, which this server's backend cannot load.
    subprocess.run([*pip, "--no-deps", "--force-reinstall", str(ROOT)], check=True)
    shutil.rmtree(ROOT / "build", ignore_errors=True)
    (found,) = ENVIRONMENT.glob("lib/python*/site-packages/pytriton/tritonserver")
    return found


@pytest.fixture(scope="module")
def ports() -> tuple[int, int]:
    """For HTTP and for gRPC."""
    return free_port(), free_port()


@pytest.fixture(scope="module")
def repository(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("triton") / "repository"
    export_repository(Bundle(tiny_bundle), folder, EngineConfig(threads=1))
    return folder


@pytest.fixture(scope="module")
def server(triton: Path, ports: tuple[int, int], repository: Path, tiny_bundle: Path) -> Iterator[str]:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    # Beside its backend, from where it finds its libraries.
    stub = triton / "python_backend_stubs" / version / "triton_python_backend_stub"
    shutil.copy2(stub, triton / "backends" / "python")
    libraries = (str(triton / "external_libs"), str(sysconfig.get_config_var("LIBDIR")))
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": ":".join(libraries),
        "PYTHONPATH": str(triton.parent.parent),
        "PATH": f"{ENVIRONMENT / 'bin'}:{os.environ['PATH']}",
    }
    words = [str(triton / "bin" / "tritonserver"), "--model-repository", str(repository)]
    words += [
        "--backend-directory",
        str(triton / "backends"),
        "--http-address",
        "127.0.0.1",
        "--http-port",
        str(ports[0]),
        "--grpc-address",
        "127.0.0.1",
        "--grpc-port",
        str(ports[1]),
        "--allow-metrics",
        "false",
        "--exit-timeout-secs",  # this old server counts requests that were cancelled until then
        "5",
    ]
    log = repository.parent / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            words, env=environment, cwd=log.parent, stdout=file, stderr=subprocess.STDOUT
        )
        url = f"http://127.0.0.1:{ports[0]}"
        try:
            wait_for(lambda: _ready(url, process, log), "a Triton that is ready", 120)
            yield f"{url}/v2/models/{tiny_bundle.name}/infer"
        finally:
            process.terminate()
            process.wait(60)


def _ready(url: str, process: "subprocess.Popen[bytes]", log: Path) -> bool:
    assert process.poll() is None, log.read_text()[-3000:]
    try:
        return httpx2.get(f"{url}/v2/health/ready", timeout=5).status_code == 200
    except httpx2.TransportError:
        return False


def _body(prompt: str, **fields: Any) -> dict[str, Any]:
    """A request as Triton takes it."""
    inputs = [{"name": "PROMPT", "datatype": "BYTES", "shape": [1, 1], "data": [prompt]}]
    for name, value in fields.items():
        kind, values = FIELDS[name].kind.replace("STRING", "BYTES"), np.atleast_1d(value).tolist()
        inputs.append({"name": name, "datatype": kind, "shape": [1, len(values)], "data": values})
    return {"inputs": inputs, "outputs": [{"name": "PNG", "parameters": {"binary_data": True}}]}


def infer(server: str, prompt: str, **fields: Any) -> np.ndarray | httpx2.Response:
    """A picture, or the answer that is none."""
    answer = httpx2.post(server, json=_body(prompt, **fields), timeout=120)
    if answer.status_code != 200:
        return answer
    raw = answer.content[int(answer.headers["inference-header-content-length"]) :]
    (size,) = struct.unpack("<I", raw[:4])
    return np.asarray(Image.open(io.BytesIO(raw[4 : 4 + size])).convert("RGB")).astype(int)


def test_overlapping_requests_are_whole_and_right(server: str, tiny_bundle: Path) -> None:
    wanted: list[dict[str, Any]] = [
        {"SEED": seed, "STEPS": (4, 12, 28)[seed % 3], "GUIDANCE": ("emag", "cfg")[seed % 2]}
        for seed in range(9)
    ]
    found: dict[int, Any] = {}
    clients = [
        threading.Thread(target=lambda n=n: found.update({n: infer(server, PROMPT, **wanted[n])}))
        for n in range(len(wanted))
    ]
    for client in clients:
        client.start()
    bad = infer(server, PROMPT, STEPS=0)
    empty = infer(server, " ")
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


def test_the_client_in_the_repository_draws(
    server: str, repository: Path, ports: tuple[int, int], tmp_path: Path
) -> None:
    """As docs/guides/triton.md starts it; only the port is another one."""
    code = (repository / "client.py").read_text("utf-8")
    assert "127.0.0.1:8000" in code
    here = code.replace("127.0.0.1:8000", f"127.0.0.1:{ports[0]}")
    words = [str(ENVIRONMENT / "bin" / "python"), "-c", here, PROMPT, "picture.png"]
    subprocess.run(words, cwd=tmp_path, check=True, timeout=120)
    request = read_picture_record(tmp_path / "picture.png").request
    assert (request.prompt, request.seed) == (PROMPT, 1)


def executions(server: str) -> int:
    """Calls of the model, by Triton's own count."""
    statistics = httpx2.get(server.replace("/infer", "/stats"), timeout=10).json()
    return int(statistics["model_stats"][0]["execution_count"])


def test_requests_share_calls(server: str) -> None:
    """Fewer executions than steps that were asked for; Triton itself batches equal sets of inputs only."""
    sets: tuple[dict[str, Any], ...] = (
        {},
        {"GUIDANCE": "cfg"},
        {"NEGATIVE_PROMPT": "blue"},
        {"EMAG_SCALE": 1.2},
    )
    before = executions(server)
    clients = [
        threading.Thread(target=lambda s=seed: infer(server, PROMPT, SEED=s, STEPS=20, **sets[s % 4]))
        for seed in range(8)
    ]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    assert executions(server) - before < 8 * 20 / 2


# HTTP clients cannot cancel here: Triton finishes the pictures of those that have gone.
LEAVERS = """
import sys
import numpy as np
import tritonclient.grpc as triton

client = triton.InferenceServerClient(sys.argv[1])
calls = []
for seed in range(8):
    inputs = [
        triton.InferInput("PROMPT", [1, 1], "BYTES"),
        triton.InferInput("SEED", [1, 1], "INT64"),
        triton.InferInput("STEPS", [1, 1], "INT32"),
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


def test_clients_that_leave_keep_no_place(server: str, ports: tuple[int, int], tiny_bundle: Path) -> None:
    """Triton does not tell the model of them; eight would hold all places for the rest of 100 steps."""
    before = executions(server)
    words = [str(ENVIRONMENT / "bin" / "python"), "-c", LEAVERS, f"127.0.0.1:{ports[1]}", tiny_bundle.name]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as leavers:
        assert leavers.stdin is not None and leavers.stdout is not None
        assert leavers.stdout.readline() == "asked\n"
        wait_for(lambda: executions(server) >= before + 3, "steps of all eight", 60)
        leavers.stdin.write("\n")
        leavers.stdin.flush()
        assert leavers.stdout.readline() == "left\n"
        left = executions(server)
        assert isinstance(infer(server, PROMPT, STEPS=2), np.ndarray)
        assert left - before < 60, "they left too late to hold a place"
        assert executions(server) - left < 30
        leavers.stdin.write("\n")


def test_nobody_takes_all_of_the_server(server: str) -> None:
    refused = infer(server, PROMPT, STEPS=2**31 - 1)
    assert isinstance(refused, httpx2.Response) and "STEPS is 2147483647; give at most 100" in refused.text
