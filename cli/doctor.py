"""``emag-export doctor``."""

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version

import click

from emag_export.cli.console import out, print_json, table

__all__ = ["command"]

_PACKAGES = {
    "torch": "pip install torch",
    "diffusers": "pip install diffusers",
    "transformers": "pip install transformers",
    "onnx": "pip install onnx",
    "onnxscript": "pip install onnxscript",
    "onnxruntime": "pip install onnxruntime",
}


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="For scripts.")
def command(as_json: bool) -> None:
    """Show what this machine can run and what to install."""
    checks, runs = _checks(), _abilities()
    if as_json:
        print_json({"checks": checks, "runs": runs})
        return
    grid = table("check", "found", "remedy")
    for check in checks:
        found = check["found"]
        grid.add_row(check["check"], found or "[red]missing[/]", "" if found else check["remedy"])
    out.print(grid)
    for ability in runs:
        out.print(f"can run: {ability}", style="green")


def _checks() -> list[dict[str, str]]:
    facts = [
        ("Python", platform.python_version(), ""),
        ("cores", str(os.cpu_count()), ""),
        ("free disk here", f"{shutil.disk_usage('.').free / 1e9:.0f} GB", ""),
        ("NVIDIA GPU", _gpu(), ""),
        *((name, _version(name), remedy) for name, remedy in _PACKAGES.items()),
    ]
    return [{"check": check, "found": found, "remedy": remedy} for check, found, remedy in facts]


def _abilities() -> list[str]:
    runs = []
    if _version("onnxruntime"):
        from emag_export.engines.ort import available_providers

        runs.append("onnxruntime on the CPU")
        if "CUDAExecutionProvider" in available_providers():
            runs.append("onnxruntime on NVIDIA GPUs (--device cuda)")
    if _version("torch"):
        runs.append("PyTorch eager, as reference")
    return runs


def _gpu() -> str:
    if not _version("torch"):
        return "unknown without torch"
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none that PyTorch sees"


def _version(package: str) -> str:
    """Installed version, empty if absent; onnxruntime comes under two names."""
    try:
        return version(package)
    except PackageNotFoundError:
        return _version("onnxruntime-gpu") if package == "onnxruntime" else ""
