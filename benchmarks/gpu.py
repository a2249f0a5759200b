"""Everything that only a GPU can show, in one run: ``python -m benchmarks.gpu --output benchmarks/results``.

Builds tiny-sd3 for the GPU of this machine with every TensorRT that accepts it, compares every engine with
PyTorch step by step, then measures speed: SD3-medium's shapes with random weights, 1024 pixels, 28 steps, one
and four pictures, every engine that runs beside CFG and the released algorithm in PyTorch. Writes one JSON
file with device, driver, versions and command.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from emag_export.bench.report import describe_machine
from emag_export.engines.tensorrt.flavour import FLAVOURS
from emag_export.engines.tensorrt.probe import probe
from emag_export.errors import EmagError

_CLI = (sys.executable, "-m", "emag_export.cli.main")
_IMAGES = (1, 4)
"""Pictures per call, at SD3-medium's own size and steps."""


def main() -> int:
    """Run what runs, record what does not and why."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--precision", choices=["fp32", "fp16"], default="fp16")
    parser.add_argument("--no-speed", action="store_true", help="Leave out SD3-medium, which takes long.")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("PyTorch sees no NVIDIA GPU; run this on a machine with one", file=sys.stderr)
        return 2
    results: dict[str, Any] = {"machine": _machine(), "engines": {}}
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
        if not arguments.no_speed:
            runs = [name for name, found in results["engines"].items() if not found.get("exit", 1)]
            results["speed"] = list(_speed(Path(folder), arguments.precision, runs))
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


def _speed(folder: Path, precision: str, engines: list[str]) -> Iterator[dict[str, Any]]:
    """Each engine beside PyTorch eager, in a process of its own, so that one which fails fails alone."""
    model = ("--model", "sd3", "--weights", "random", "--components", "transformer", "--precision", precision)
    query, maps = (str(folder / variant) for variant in ("emag-q", "emag"))
    backends = [name for name in dict.fromkeys([*engines, "torch-compile"]) if name != "torch"]
    tensorrt = [name for name in backends if name in FLAVOURS]
    for path, variant in ((query, "emag-q"), (maps, "emag")):
        _run("build", *model, "--variant", variant, "-o", path)
        for backend in tensorrt:
            _run("build", *model, "--variant", variant, "-o", path, "--backend", backend)
    for images in _IMAGES:
        for backend in backends:
            device = () if backend in tensorrt else ("--device", "cuda")
            command = ["bench", query, "--with", maps, "--backend", backend, *device, "--images", str(images)]
            done = subprocess.run([*_CLI, *command, "--json"], capture_output=True, text=True, check=False)
            found = {"report": json.loads(done.stdout)} if not done.returncode else {"refused": done.stderr}
            yield {"backend": backend, "images": images, **found}


def _run(*arguments: str) -> str:
    return subprocess.run([*_CLI, *arguments], stdout=subprocess.PIPE, text=True, check=True).stdout


def _machine() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    driver = ""
    if smi := shutil.which("nvidia-smi"):
        query = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return {
        **describe_machine(),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "gpu_memory_bytes": properties.total_memory,
        "driver": driver,
        "cuda": torch.version.cuda,
    }


if __name__ == "__main__":
    raise SystemExit(main())
