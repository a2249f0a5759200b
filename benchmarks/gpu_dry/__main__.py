"""onnxruntime's CUDA provider without a GPU: where nodes run, and whether CUDA graphs hold them.

``python -m benchmarks.gpu_dry`` exports the graphs, compiles stub CUDA libraries and runs onnxruntime-gpu
over them. Nothing is computed. See docs/results/gpu-dry.md.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Column, Table

from benchmarks.gpu_dry.copies import inserted_copies
from benchmarks.gpu_dry.environment import make_environment, provider_library
from benchmarks.gpu_dry.graphs import DryGraph, control_graph, denoiser_graphs
from benchmarks.gpu_dry.job import RUNS, describe
from benchmarks.gpu_dry.judge import Call, judge, read_log
from benchmarks.gpu_dry.stub_libraries import build_libraries, needed_symbols, require_compiler
from emag_export.engines.ort_providers import CUDA
from emag_export.errors import EmagError, EngineError

_RUNNER = Path(__file__).parent / "runner.py"


@dataclass(frozen=True, kw_only=True)
class Found:
    """What the dry run of one graph showed."""

    graph: str
    nodes: dict[str, int]
    """How many, by provider."""
    copies: list[str]
    """Between CPU and GPU, inserted by onnxruntime."""
    calls: list[Call]
    wrong: list[str]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A machine with a GPU, pretended."""

    python: Path
    """Of the environment with onnxruntime-gpu."""
    libraries: Path
    """Folder with the stub libraries."""
    architecture: int
    """Compute capability, times 10."""


def make_machine(folder: Path, architecture: int) -> Machine:
    """Install onnxruntime-gpu and compile the libraries that it asks for.

    Raises:
        MissingDependencyError: If there is no gcc, or no network the first time.
    """
    require_compiler()
    python = make_environment(folder / "venv")
    libraries = folder / "libraries"
    build_libraries(libraries, needed_symbols(provider_library(folder / "venv")))
    return Machine(python=python, libraries=libraries.resolve(), architecture=architecture)


def check(machine: Machine, graph: DryGraph, folder: Path) -> Found:
    """Run one graph in a process of its own, and judge its log.

    Args:
        machine: To run on.
        graph: The graph.
        folder: For job, result, log and what onnxruntime prints.

    Raises:
        EngineError: If the process dies.
    """
    folder.mkdir(parents=True, exist_ok=True)
    job, result, log, output = (
        folder / name for name in ("job.json", "result.json", "log.txt", "output.txt")
    )
    job.write_text(json.dumps(describe(graph), indent=2), "utf-8")
    for old in (result, log):
        old.unlink(missing_ok=True)
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(machine.libraries),
        "GPU_DRY_LOG": str(log),
        "GPU_DRY_SM": str(machine.architecture),
    }
    command = (machine.python, _RUNNER, job, result)
    with output.open("w", encoding="utf-8") as text:
        done = subprocess.run(command, env=environment, stdout=text, stderr=text, check=False)
    if not result.exists():
        raise EngineError(f"the dry run of {graph.name} ended with status {done.returncode}; see {output}")
    facts = json.loads(result.read_text("utf-8"))
    calls = read_log(log.read_text("utf-8"))
    optimised = result.with_suffix(".onnx")
    copies = inserted_copies(optimised) if optimised.exists() else []
    wrong = _wrong(facts["error"], copies, calls)
    return Found(graph=graph.name, nodes=facts["nodes"], copies=copies, calls=calls, wrong=wrong)


def _wrong(error: str | None, copies: list[str], calls: list[Call]) -> list[str]:
    wrong = [f"a copy between CPU and GPU: {copy}" for copy in copies]
    if error is not None:
        wrong.append(f"onnxruntime refuses: {error.strip()}")
    elif len(calls) != len(RUNS):
        wrong.append(f"{len(RUNS)} calls were to be made, the log has {len(calls)}")
    return wrong + judge(calls)


def _table(rows: list[Found]) -> Table:
    """Nodes, what the first captured graph holds, and the outcome."""
    columns = (Column("graph", no_wrap=True), "GPU", "CPU", "copies", "kernels", "library", "result")
    table = Table(*columns, box=SIMPLE)
    for row in rows:
        captured = next((call.captured for call in row.calls if call.captured), ())
        names = [event.name for event in captured]
        on_gpu = row.nodes.get(CUDA, 0)
        figures = (on_gpu, sum(row.nodes.values()) - on_gpu, len(row.copies))
        inside = (names.count("kernel"), names.count("call"))
        result = f"{len(row.wrong)} wrong" if row.wrong else "passed"
        table.add_row(row.graph, *map(str, (*figures, *inside)), result)
    return table


def main() -> int:
    """Run every graph and the control; 1 if a graph fails or the control does not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("out/gpu-dry"))
    parser.add_argument(
        "--sm", type=int, default=90, help="compute capability of the pretended GPU, times 10"
    )
    arguments = parser.parse_args()
    folder: Path = arguments.output
    console = Console()
    try:
        console.print("environment with onnxruntime-gpu: the first time 256 MB are downloaded")
        machine = make_machine(folder, arguments.sm)
        graphs = denoiser_graphs(folder / "graphs", lambda name: console.print(f"graphs of {name}"))
        graphs.append(control_graph(folder / "control"))
        *rows, control = [
            check(machine, graph, folder / "runs" / graph.name.replace(" ", "-")) for graph in graphs
        ]
    except EmagError as error:
        console.print(str(error), style="red", soft_wrap=True)
        return error.exit_code
    console.print(_table([*rows, control]))
    for row in (*rows, control):
        for text in row.wrong:
            console.print(f"{row.graph}: {text}", highlight=False, soft_wrap=True)
    failed = any(row.wrong for row in rows)
    if not control.copies or not any("onnxruntime refuses" in text for text in control.wrong):
        console.print("the control was to fail, and did not: these checks find nothing", style="red")
        failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
