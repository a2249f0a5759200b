"""``emag-export doctor``."""

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version

from rich.markup import escape

from emag_export.cli.console import out, print_json, table
from emag_export.cli.options import cli_command, group, json_option
from emag_export.cli.words import sentence
from emag_export.engines.tensorrt.flavour import FLAVOURS, Flavour
from emag_export.engines.tensorrt.gpu import current_gpu
from emag_export.engines.tensorrt.probe import probe
from emag_export.errors import EmagError
from emag_export.packages import install_command
from emag_export.version import VERSION

__all__ = ["command"]

_PACKAGES = {
    "torch": "pip install torch",
    "diffusers": "pip install diffusers",
    "transformers": "pip install transformers",
    "onnxruntime": f"{install_command('cpu')}, or {install_command('gpu')} for an NVIDIA GPU",
    "onnx": f"{install_command('export')}, to export",
    "onnxscript": f"{install_command('export')}, to export",
    "matplotlib": f"{install_command('report')}, for reports and plots",
    "scikit-image": f"{install_command('report')}, to compare",
    "polygraphy": f"{install_command('tensorrt-rtx')}, to build engines",
}


@cli_command("doctor")
@group("Output", json_option())
def command(as_json: bool) -> None:
    """Show what this machine can run and what to install."""
    checks, runs = _checks(), _abilities()
    if as_json:
        print_json({"checks": checks, "runs": runs})
        return
    grid = table("check", "found", "remedy")
    for check in checks:
        found, remedy = (
            escape(check[column]) for column in ("found", "remedy")
        )  # [tensorrt-rtx] is no style
        grid.add_row(check["check"], found or "[red]missing[/]", "" if found else remedy)
    out.print(grid)
    for ability in runs:
        out.print(f"can run: {ability}", style="green", markup=False)


def _checks() -> list[dict[str, str]]:
    facts = [
        ("emag-export", VERSION, ""),
        ("system", platform.platform(), ""),
        ("Python", platform.python_version(), ""),
        ("cores", str(os.cpu_count()), ""),
        ("free disk here", f"{shutil.disk_usage('.').free / 1e9:.0f} GB", ""),
        ("NVIDIA GPU", _gpu(), ""),
        *((name, _version(name), remedy) for name, remedy in _PACKAGES.items()),
        *((name, _engine_version(flavour), flavour.install) for name, flavour in FLAVOURS.items()),
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
    for flavour in FLAVOURS.values():
        if _engine_version(flavour) and (ability := _engine_ability(flavour)):
            runs.append(ability)
    return runs


def _engine_version(flavour: Flavour) -> str:
    try:
        return flavour.version()
    except EmagError:
        return ""


def _engine_ability(flavour: Flavour) -> str | None:
    """What the installed module can do here, in one line; a GPU it refuses is named with its reason."""
    built_for = f"builds engines for {', '.join(flavour.targets)}" if flavour.targets else ""
    if not _sees_gpu():
        return f"{flavour.backend}: {built_for}; running them needs a GPU" if built_for else None
    try:
        gpu = current_gpu(flavour)
        probe(flavour)
    except EmagError as error:
        said = sentence(error)
        return f"{flavour.backend}: {built_for}; runs none here: {said}" if built_for else said
    return f"{flavour.backend}: builds and runs engines on {gpu.name}"


def _gpu() -> str:
    if not _version("torch"):
        return "unknown without torch"
    if not _sees_gpu():
        return "none that PyTorch sees"
    import torch

    return torch.cuda.get_device_name()


def _sees_gpu() -> bool:
    if not _version("torch"):
        return False
    import torch

    return torch.cuda.is_available()


def _version(package: str) -> str:
    """Installed version, empty if absent; onnxruntime comes under two names."""
    try:
        return version(package)
    except PackageNotFoundError:
        return _version("onnxruntime-gpu") if package == "onnxruntime" else ""
