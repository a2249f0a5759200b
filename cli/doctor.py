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
    facts = _facts()
    if as_json:
        print_json(facts)
        return
    grid = table("check", "found", "remedy")
    for check, found, remedy in facts["checks"]:
        grid.add_row(check, found or "[red]missing[/]", "" if found else remedy)
    out.print(grid)
    for ability in facts["runs"]:
        out.print(f"can run: {ability}", style="green")


def _facts() -> dict[str, list[list[str]] | list[str]]:
    checks = [
        ["Python", platform.python_version(), ""],
        ["cores", str(os.cpu_count()), ""],
        ["free disk here", f"{shutil.disk_usage('.').free / 1e9:.0f} GB", ""],
        *([name, _version(name), remedy] for name, remedy in _PACKAGES.items()),
    ]
    runs = []
    if _version("onnxruntime"):
        from emag_export.engines.ort import available_providers

        providers = available_providers()
        runs.append("onnxruntime on the CPU")
        if "CUDAExecutionProvider" in providers:
            runs.append("onnxruntime on NVIDIA GPUs (--device cuda)")
    if _version("torch"):
        import torch

        runs.append("PyTorch eager, as reference")
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
        checks.append(["NVIDIA GPU", gpu or "none", ""])
    return {"checks": checks, "runs": runs}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        if package == "onnxruntime":
            return _version("onnxruntime-gpu")
        return ""
