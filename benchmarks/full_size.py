"""Export and compile models of full size with random weights: ``python -m benchmarks.full_size``.

Every component is exported, and its engine built, in a process of its own, which is watched from outside:
peak memory is that of the whole process, libraries included, in two kinds, its own and pages of files
that it has mapped.
"""

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from benchmarks.results import FOLDER, commit, load_results, write_results
from emag_export.bench.memory import MemorySampler
from emag_export.bundle import DENOISER, GRAPH_FILE
from emag_export.exporter.describe.identify import BuildPlan, identify
from emag_export.families import RANDOM_MODELS
from emag_export.options import BuildOptions
from emag_export.progress import silent

_DEFAULT = (
    *(f"sd3/{name}" for name in RANDOM_MODELS["sd3"].folders),
    "sd3.5-medium/transformer",
    "sd3.5-large/transformer",
)
RESULTS = FOLDER / "full-size.json"


def axes() -> dict[str, Any]:
    """What is varied; rows of further parts and precisions are kept beside these."""
    return {"part": list(_DEFAULT)}


@click.command()
@click.argument("parts", nargs=-1)
@click.option("--precision", default="float16", show_default=True)
@click.option("--target", default="sm89", show_default=True, help="GPU to build engines for; empty for none.")
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
@click.option(
    "--work", type=click.Path(path_type=Path), help="Folder for the graphs; default: a temporary one."
)
@click.option("--child", hidden=True, help="export or compile: one part, in this process.")
def main(
    parts: tuple[str, ...], precision: str, target: str, output: Path, work: Path | None, child: str | None
) -> None:
    """Measure PARTS, each MODEL/COMPONENT; without any, everything the documentation shows."""
    if child is not None:
        assert work is not None, "the parent gives a folder"
        (part,) = parts
        click.echo(
            json.dumps(
                _export(part, precision, work)
                if child == "export"
                else _compile(part, precision, target, work)
            )
        )
        return
    known = load_results(output)["rows"] if output.is_file() else []
    rows = {(row["part"], row["precision"]): row for row in known}
    with tempfile.TemporaryDirectory() as temporary:
        for part in parts or _DEFAULT:
            folder = (work or Path(temporary)) / part.replace("/", "-")
            before = rows.get((part, precision), {})
            rows[part, precision] = _measure(part, precision, target, folder)
            if not target and "engine" in before:  # its graph has not changed by being exported again
                rows[part, precision]["engine"] = {"commit": before["commit"], **before["engine"]}
            command = "python -m benchmarks.full_size"
            write_results(output, command=command, axes=axes(), rows=list(rows.values()))
            shutil.rmtree(folder, ignore_errors=True)


def _measure(part: str, precision: str, target: str, folder: Path) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    row = {
        "part": part,
        "precision": precision,
        "commit": commit(),
        "export": _child("export", part, precision, target, folder),
    }
    if target and "failed" not in row["export"]:
        row["engine"] = _child("compile", part, precision, target, folder)
    click.echo(json.dumps(row))
    return row


def _child(task: str, part: str, precision: str, target: str, folder: Path) -> dict[str, Any]:
    command = [
        *(sys.executable, "-m", "benchmarks.full_size", part, "--child", task),
        *("--precision", precision, "--target", target, "--work", str(folder)),
    ]
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True) as process,
        MemorySampler(process.pid) as sampler,
    ):
        answer, _ = process.communicate()
        said.seek(0)
        errors = said.read()
    if process.returncode:
        if process.returncode == -signal.SIGKILL:  # the kernel's way of saying so
            return {"failed": "out of memory"}
        last = errors.strip().splitlines()[-1:] or [f"ended with {process.returncode}"]
        return {"failed": last[0]}
    return {**json.loads(answer.strip().splitlines()[-1]), "peak": asdict(sampler.peak)}


def _identified(part: str, precision: str) -> tuple[BuildPlan, str]:
    """What is built of a model with random weights, and the component that is meant."""
    model, name = part.split("/")
    return identify(model, BuildOptions(precision=precision, weights_seed=0)), name


def _export(part: str, precision: str, folder: Path) -> dict[str, Any]:
    from emag_export.exporter.graph.export import export_component

    plan, name = _identified(part, precision)
    family = plan.source.family
    began = time.monotonic()
    export_component(plan, name, folder, silent)
    return {
        "seconds": round(time.monotonic() - began, 1),
        "cpu_seconds": round(time.process_time(), 1),
        "parameters": family.parameters[plan.source.name if name == DENOISER else family.folders[name]],
        "bytes": sum(path.stat().st_size for path in folder.glob(f"{GRAPH_FILE}*")),
    }


def _compile(part: str, precision: str, target: str, folder: Path) -> dict[str, Any]:
    from emag_export.engines.tensorrt.builder import build_plan
    from emag_export.engines.tensorrt.flavour import flavour_of
    from emag_export.engines.tensorrt.options import EngineOptions
    from emag_export.engines.tensorrt.profiles import profiles_of
    from emag_export.exporter.graph.export import component_spec

    plan, name = _identified(part, precision)
    flavour, options = flavour_of("tensorrt-rtx"), EngineOptions(targets=(target,), max_images=1)
    spec = component_spec(plan, name)
    profiles = profiles_of(plan, spec, options, flavour)
    built = build_plan(folder / GRAPH_FILE, spec, profiles, flavour, options)
    return {
        "seconds": round(built.seconds, 1),
        "bytes": memoryview(built.data).nbytes,
        "memory": dict(built.memory),
    }


if __name__ == "__main__":
    main()
