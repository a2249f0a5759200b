"""A real Triton Inference Server on the loopback address, for tests and measurements.

The server is the one inside the wheel ``nvidia-pytriton``, in an environment of its own that is made once and
kept in ``out/``: its python backend needs numpy 1.
"""

import os
import shutil
import struct
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import numpy as np

from benchmarks.serving.servers import free_port, wait_until_ready
from emag_export.serve.triton.fields import FIELDS

__all__ = ["ENVIRONMENT", "CannotInstallError", "Triton", "png_of", "prepare", "running_triton"]

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = ROOT / "out" / "triton-env"
_RUNTIME = ("diffusers", "transformers", "jaxtyping", "pydantic", "psutil", "safetensors", "pillow", "click")
_START_SECONDS = 300
"""Two starts have taken more than three minutes."""


class CannotInstallError(RuntimeError):
    """There is no wheel of the server here; the message is pip's."""


@dataclass(frozen=True, kw_only=True)
class Triton:
    """A server that is ready."""

    model: str
    """Name of the one that it has."""
    process: "subprocess.Popen[bytes]"
    http: str
    """Address, with its protocol."""
    grpc: str
    """Address, without."""
    start: float
    """Seconds until it was ready."""

    def ask(self, prompt: str, **fields: Any) -> httpx2.Response:
        """Ask for a picture by HTTP.

        Args:
            prompt: For it.
            fields: Other inputs of the model, by their names.
        """
        url = f"{self.http}/v2/models/{self.model}/infer"
        return httpx2.post(url, json=_body(prompt, fields), timeout=120)

    def executions(self) -> int:
        """Calls of the model so far, by Triton's own count."""
        answer = httpx2.get(f"{self.http}/v2/models/{self.model}/stats", timeout=10)
        return int(answer.json()["model_stats"][0]["execution_count"])


def prepare() -> Path:
    """Install server and package into the environment.

    Returns:
        The folder of the server.

    Raises:
        CannotInstallError: If there is no wheel of it here.
    """
    python = ENVIRONMENT / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    if not (ENVIRONMENT / ".ready").exists():
        shutil.rmtree(ENVIRONMENT, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
        import torch

        # The same torch as here: any other might be a build for GPUs, with gigabytes of libraries.
        subprocess.run([*pip, f"torch=={torch.__version__.partition('+')[0]}"], check=True)
        wanted = ["numpy<2", "nvidia-pytriton", "onnxruntime>=1.24", *_RUNTIME]
        done = subprocess.run([*pip, *wanted], capture_output=True, text=True, check=False)
        if done.returncode:
            raise CannotInstallError(done.stderr.strip().splitlines()[-1])
        (ENVIRONMENT / ".ready").touch()
    # Without its requirements: they name numpy 2, which this server's backend cannot load.
    subprocess.run([*pip, "--no-deps", "--force-reinstall", str(ROOT)], check=True)
    shutil.rmtree(ROOT / "build", ignore_errors=True)
    (found,) = ENVIRONMENT.glob("lib/python*/site-packages/pytriton/tritonserver")
    return found


@contextmanager
def running_triton(triton: Path, repository: Path) -> Iterator[Triton]:
    """Start the server on free ports, wait until it is ready, and stop it at the end.

    Args:
        triton: What :func:`prepare` gave.
        repository: Of one model, which is served; the log is written beside it.

    Raises:
        RuntimeError: If it ends, or does not become ready.
    """
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
    http, grpc = free_port(), free_port()
    options = {
        "--model-repository": repository,
        "--backend-directory": triton / "backends",
        "--http-address": "127.0.0.1",
        "--http-port": http,
        "--grpc-address": "127.0.0.1",
        "--grpc-port": grpc,
        "--allow-metrics": "false",
        "--exit-timeout-secs": 5,  # this old server counts requests that were cancelled until then
    }
    words = [str(triton / "bin" / "tritonserver"), *(str(part) for pair in options.items() for part in pair)]
    log, began = repository.parent / "log", time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            words, env=environment, cwd=log.parent, stdout=file, stderr=subprocess.STDOUT
        )
        url = f"http://127.0.0.1:{http}"
        try:
            try:
                wait_until_ready(process, url, path="/v2/health/ready", seconds=_START_SECONDS)
            except RuntimeError as error:
                raise RuntimeError(f"{error}: {log.read_text()[-3000:]}") from error
            start = time.monotonic() - began
            (model,) = (config.parent.name for config in repository.glob("*/config.pbtxt"))
            yield Triton(model=model, process=process, http=url, grpc=f"127.0.0.1:{grpc}", start=start)
        finally:
            process.terminate()
            process.wait(60)


def png_of(answer: httpx2.Response) -> bytes:
    """The picture in an answer."""
    raw = answer.content[int(answer.headers["inference-header-content-length"]) :]
    (size,) = struct.unpack("<I", raw[:4])
    return raw[4 : 4 + size]


def _body(prompt: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """A request as Triton takes it."""
    inputs = [{"name": "PROMPT", "datatype": "BYTES", "shape": [1, 1], "data": [prompt]}]
    for name, value in fields.items():
        kind, values = FIELDS[name].kind.replace("STRING", "BYTES"), np.atleast_1d(value).tolist()
        inputs.append({"name": name, "datatype": kind, "shape": [1, len(values)], "data": values})
    return {"inputs": inputs, "outputs": [{"name": "PNG", "parameters": {"binary_data": True}}]}
