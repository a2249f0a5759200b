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
from dataclasses import asdict, dataclass, replace
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
from emag_export.quantisation import SCHEMES, Scheme

_DEFAULT = (
    *(f"sd3/{name}" for name in RANDOM_MODELS["sd3"].folders),
    "sd3.5-medium/transformer",
    "sd3.5-large/transformer",
)
RESULTS = FOLDER / "full-size.json"

_CALIBRATION: dict[str, Any] = {"prompts": ["a harbour", "a bowl of soup"], "steps": 2, "pixels": 256}
"""Random weights have no ranges worth knowing: this is for time and memory."""


def axes() -> dict[str, Any]:
    """What is varied; rows of further parts and precisions are kept beside these."""
    return {"part": list(_DEFAULT)}


@click.command()
@click.argument("parts", nargs=-1)
@click.option("--precision", default="float16", show_default=True)
@click.option("--quantize", type=click.Choice([str(scheme) for scheme in Scheme]), help="And quantised so.")
@click.option("--target", default="sm89", show_default=True, help="GPU to build engines for; empty for none.")
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
@click.option(
    "--work", type=click.Path(path_type=Path), help="Folder for the graphs; default: a temporary one."
)
@click.option("--child", hidden=True, help="export or compile: one part, in this process.")
def main(parts: tuple[str, ...], child: str | None, work: Path | None, output: Path, **options: Any) -> None:
    """Measure PARTS, each MODEL/COMPONENT; without any, everything the documentation shows."""
    if child is not None:
        assert work is not None, "the parent gives a folder"
        (part,) = parts
        subject = Subject(part=part, **options)
        click.echo(json.dumps(_export(subject, work) if child == "export" else _compile(subject, work)))
        return
    known = load_results(output)["rows"] if output.is_file() else []
    rows = {(row["part"], row["precision"], row.get("scheme")): row for row in known}
    with tempfile.TemporaryDirectory() as temporary:
        for part in parts or _DEFAULT:
            folder = (work or Path(temporary)) / part.replace("/", "-")
            subject = Subject(part=part, **options)
            key = (part, subject.precision, subject.quantize)
            before = rows.get(key, {})
            rows[key] = _measure(subject, folder)
            if not subject.target and "engine" in before:  # its graph is not changed by another export
                rows[key]["engine"] = {"commit": before["commit"], **before["engine"]}
            command = "python -m benchmarks.full_size"
            write_results(output, command=command, axes=axes(), rows=list(rows.values()))
            shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is exported, and how."""

    part: str
    precision: str
    quantize: str | None
    target: str

    def words(self) -> list[str]:
        """Of the command line."""
        scheme = [] if self.quantize is None else ["--quantize", self.quantize]
        return [self.part, "--precision", self.precision, "--target", self.target, *scheme]


def _measure(subject: Subject, folder: Path) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    row: dict[str, Any] = {"part": subject.part, "precision": subject.precision, "scheme": subject.quantize}
    row |= {"commit": commit(), "export": _child("export", subject, folder)}
    if subject.target and "failed" not in row["export"]:
        row["engine"] = _child("compile", subject, folder)
    click.echo(json.dumps(row))
    return row


def _child(task: str, subject: Subject, folder: Path) -> dict[str, Any]:
    command = [
        *(sys.executable, "-m", "benchmarks.full_size", "--child", task),
        *("--work", str(folder), *subject.words()),
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


def _identified(subject: Subject, folder: Path) -> tuple[BuildPlan, str]:
    """What is built of a model with random weights, and the component that is meant."""
    model, name = subject.part.split("/")
    scheme = None if subject.quantize is None else Scheme(subject.quantize)
    options = BuildOptions(precision=subject.precision, weights_seed=0, quantize=scheme)
    if scheme is not None and SCHEMES[scheme].calibrated:
        prompts = folder / "prompts.txt"
        prompts.write_text("\n".join(_CALIBRATION["prompts"]), "utf-8")
        steps, pixels = _CALIBRATION["steps"], _CALIBRATION["pixels"]
        options = replace(
            options, calibration_prompts=prompts, calibration_steps=steps, calibration_size=pixels
        )
    return identify(model, options), name


def _export(subject: Subject, folder: Path) -> dict[str, Any]:
    from emag_export.calibration.measure import measure_ranges
    from emag_export.exporter.graph.export import export_component

    plan, name = _identified(subject, folder)
    family = plan.source.family
    ranges, calibration = {}, {}
    began = time.monotonic()
    if plan.quantisation is not None and plan.quantisation.calibration is not None:
        ranges = measure_ranges(plan, folder)
        steps = plan.quantisation.calibration.steps * len(plan.quantisation.calibration.prompts)
        calibration = {"calibration": {"seconds": round(time.monotonic() - began, 1), "steps": steps}}
        began = time.monotonic()
    export_component(plan, name, folder, silent, ranges)
    return {
        **calibration,
        "seconds": round(time.monotonic() - began, 1),
        "cpu_seconds": round(time.process_time(), 1),
        "parameters": family.parameters[plan.source.name if name == DENOISER else family.folders[name]],
        "bytes": sum(path.stat().st_size for path in folder.glob(f"{GRAPH_FILE}*")),
    }


def _compile(subject: Subject, folder: Path) -> dict[str, Any]:
    from emag_export.engines.tensorrt.builder import build_plan
    from emag_export.engines.tensorrt.flavour import flavour_of
    from emag_export.engines.tensorrt.options import EngineOptions
    from emag_export.engines.tensorrt.profiles import profiles_of
    from emag_export.exporter.graph.export import component_spec

    plan, name = _identified(subject, folder)
    flavour, options = flavour_of("tensorrt-rtx"), EngineOptions(targets=(subject.target,), max_images=1)
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
