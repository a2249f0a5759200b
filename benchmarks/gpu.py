"""Everything that only a GPU can show, in one run: ``python -m benchmarks.gpu --output benchmarks/results``.

Builds tiny-sd3 for the GPU of this machine with every TensorRT that accepts it, compares every engine with
PyTorch step by step, and writes one JSON file with device, driver, versions and command.
"""

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from emag_export.engines.tensorrt.flavour import FLAVOURS
from emag_export.engines.tensorrt.probe import probe
from emag_export.errors import EmagError

_CLI = (sys.executable, "-m", "emag_export.cli.main")
_PACKAGES = ("torch", "onnxruntime-gpu", "onnxruntime", "tensorrt", "tensorrt-rtx", "polygraphy")


def main() -> int:
    """Run what runs, record what does not and why."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--precision", choices=["fp32", "fp16"], default="fp16")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("PyTorch sees no NVIDIA GPU; run this on a machine with one", file=sys.stderr)
        return 2
    results: dict[str, Any] = {"machine": _machine(), "command": " ".join(sys.argv), "engines": {}}
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        build = ("build", "--model", "tiny-sd3", "--precision", arguments.precision, "-o", str(bundle))
        _run(*build)
        for name, flavour in FLAVOURS.items():
            try:
                probe(flavour)
            except EmagError as error:
                results["engines"][name] = {"refused": str(error)}
                continue
            built = json.loads(_run(*build, "--backend", name, "--json"))
            report = json.loads(_run("inspect", str(bundle), "--engine", "--json"))
            results["engines"][name] = {
                "build": built["engines"],
                "inspect": report,
                **_compare(bundle, name),
            }
        results["engines"]["onnxruntime"] = _compare(bundle, "onnxruntime", "--device", "cuda")
        for name in ("torch", "torch-compile"):
            results["engines"][name] = _compare(bundle, name, "--device", "cuda")
    path = arguments.output / f"gpu-{torch.cuda.get_device_name().lower().replace(' ', '-')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n", "utf-8")
    print(path)
    return 0


def _compare(bundle: Path, backend: str, *more: str) -> dict[str, Any]:
    command = [*_CLI, "compare", str(bundle), "--backend", backend, *more, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.stdout.strip():
        return {"compare": json.loads(done.stdout), "exit": done.returncode}
    return {"refused": done.stderr.strip(), "exit": done.returncode}


def _run(*arguments: str) -> str:
    return subprocess.run([*_CLI, *arguments], stdout=subprocess.PIPE, text=True, check=True).stdout


def _machine() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    driver = ""
    if smi := shutil.which("nvidia-smi"):
        query = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "device": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "driver": driver,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "versions": versions,
    }


if __name__ == "__main__":
    raise SystemExit(main())
