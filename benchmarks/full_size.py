"""Export and compile models of full size with random weights: ``python -m benchmarks.full_size``.

Every component is exported, and its engine built, in a process of its own, so that peak memory is its own.
Writes a JSON file and the table in ``docs/full-size.md``.
"""

import json
import platform
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from emag_export.architectures import PARAMETERS
from emag_export.bundle import COMPONENTS, DENOISER, GRAPH_FILE
from emag_export.exporter.identify import BuildOptions, identify

_DEFAULT = (
    *(f"sd3/{name}" for name in COMPONENTS),
    "sd3.5-medium/transformer",
    "sd3.5-large/transformer",
)
_PACKAGES = ("torch", "onnx", "onnxscript", "tensorrt-rtx", "polygraphy")
_TABLE = Path("docs/full-size.md")
_BEGIN, _END = "<!-- table of benchmarks.full_size -->", "<!-- end of table -->"


@click.command()
@click.argument("parts", nargs=-1)
@click.option("--precision", default="float16", show_default=True)
@click.option("--target", default="sm89", show_default=True, help="GPU to build engines for; empty for none.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("benchmarks/results/full-size.json"))
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
    known = json.loads(output.read_text("utf-8"))["rows"] if output.is_file() else []
    rows = {(row["part"], row["precision"]): row for row in known}
    with tempfile.TemporaryDirectory() as temporary:
        for part in parts or _DEFAULT:
            folder = (work or Path(temporary)) / part.replace("/", "-")
            rows[part, precision] = _measure(part, precision, target, folder)
            _write(list(rows.values()), output)
            shutil.rmtree(folder, ignore_errors=True)


def _measure(part: str, precision: str, target: str, folder: Path) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    row = {"part": part, "precision": precision, "export": _child("export", part, precision, target, folder)}
    if target and "failed" not in row["export"]:
        row["engine"] = _child("compile", part, precision, target, folder)
    click.echo(json.dumps(row))
    return row


def _child(task: str, part: str, precision: str, target: str, folder: Path) -> dict[str, Any]:
    command = [
        *(sys.executable, "-m", "benchmarks.full_size", part, "--child", task),
        *("--precision", precision, "--target", target, "--work", str(folder)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        if done.returncode == -signal.SIGKILL:  # the kernel's way of saying so
            return {"failed": "out of memory"}
        last = done.stderr.strip().splitlines()[-1:] or [f"ended with {done.returncode}"]
        return {"failed": last[0]}
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def _export(part: str, precision: str, folder: Path) -> dict[str, Any]:
    from emag_export.exporter.export import export_component

    model, name = part.split("/")
    plan = identify(model, BuildOptions(precision=precision, seed=0), lambda component, phase: None)
    began = time.monotonic()
    export_component(plan, name, folder, lambda component, phase: None)
    return {
        "seconds": round(time.monotonic() - began, 1),
        "parameters": PARAMETERS[model if name == DENOISER else COMPONENTS[name]],
        "bytes": sum(path.stat().st_size for path in folder.glob(f"{GRAPH_FILE}*")),
        "peak_bytes": _peak(),
    }


def _compile(part: str, precision: str, target: str, folder: Path) -> dict[str, Any]:
    from emag_export.engines.tensorrt.builder import build_plan
    from emag_export.engines.tensorrt.flavour import flavour_of
    from emag_export.engines.tensorrt.options import EngineOptions
    from emag_export.engines.tensorrt.profiles import profiles_of
    from emag_export.exporter.export import component_spec

    model, name = part.split("/")
    plan = identify(model, BuildOptions(precision=precision, seed=0), lambda component, phase: None)
    flavour, options = flavour_of("tensorrt-rtx"), EngineOptions(targets=(target,), max_images=1)
    spec = component_spec(plan, name)
    profiles = profiles_of(plan, spec, options, flavour)
    built = build_plan(folder / GRAPH_FILE, spec, profiles, flavour, options)
    return {
        "seconds": round(built.seconds, 1),
        "bytes": memoryview(built.data).nbytes,
        "memory": dict(built.memory),
        "peak_bytes": _peak(),
    }


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _write(rows: list[dict[str, Any]], output: Path) -> None:
    machine = {
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in _PACKAGES},
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    data = {"machine": machine, "command": "python -m benchmarks.full_size", "rows": rows}
    output.write_text(json.dumps(data, indent=2) + "\n", "utf-8")
    if _TABLE.is_file():
        text = _TABLE.read_text("utf-8")
        before, after = text.split(_BEGIN)[0], text.split(_END)[1]
        _TABLE.write_text(f"{before}{_BEGIN}\n{_table(rows)}{_END}{after}", "utf-8")


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| model / component | precision | parameters | graph | export | peak memory | engine | build | peak "
        "memory | scratch |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        made, engine = row["export"], row.get("engine", {"failed": "not built"})
        cells = [row["part"], row["precision"]]
        cells += (
            [made["failed"], *[""] * 3]
            if "failed" in made
            else [
                f"{made['parameters'] / 1e6:.0f} M",
                _gb(made["bytes"]),
                f"{made['seconds']:.0f} s",
                _gb(made["peak_bytes"]),
            ]
        )
        cells += (
            [engine["failed"], *[""] * 3]
            if "failed" in engine
            else [
                _gb(engine["bytes"]),
                f"{engine['seconds']:.0f} s",
                _gb(engine["peak_bytes"]),
                _gb(engine["memory"]["scratch"]),
            ]
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


if __name__ == "__main__":
    main()
