"""Error of every engine against the recorded runs of the released algorithm.

``python -m benchmarks.golden_errors``
"""

import tempfile
from pathlib import Path
from typing import Any

import click
from diffusers import SD3Transformer2DModel

from benchmarks.results import FOLDER, write_results
from emag_export.bundle import engine_graph_file
from emag_export.cli.console import out, quiet_libraries, status, table
from emag_export.engines.eager import EagerEngine
from emag_export.engines.ort import OnnxRuntimeEngine
from emag_export.exporter.graph.examples import DENOISER_EXAMPLE_SIZES, random_inputs
from emag_export.exporter.graph.fork import fork
from emag_export.exporter.graph.onnx_export import export_graph
from emag_export.exporter.graph.passes import write_engine_graphs
from emag_export.families import FAMILIES
from emag_export.kinds import Renorm, Variant
from tests.golden.case import GoldenCase, replay

_FOLDER = Path("tests/golden")
RESULTS = FOLDER / "golden_errors.json"


def axes() -> dict[str, Any]:
    """What is varied."""
    return {"case": sorted(path.stem for path in _FOLDER.glob("*.npz")), "engine": ["torch", "onnxruntime"]}


@click.command()
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
def main(output: Path) -> None:
    """Replay every case on both engines, print a table, and write the result."""
    quiet_libraries()
    model = SD3Transformer2DModel.from_pretrained(_FOLDER / "mmdit").eval()
    graphs: dict[tuple[Variant, Renorm, tuple[int, ...]], Path] = {}
    rows = []
    with tempfile.TemporaryDirectory() as folder, status.status("replaying …") as spinner:
        for path in sorted(_FOLDER.glob("*.npz")):
            case = GoldenCase.load(path)
            contract = FAMILIES["sd3"].contract(
                model.config, variant=case.variant, blocks=case.blocks, renorm=case.renorm
            )
            forked = fork(model, contract)
            kind = (case.variant, case.renorm, case.blocks)
            if kind not in graphs:
                spinner.update(f"exporting {contract.variant} …")
                graphs[kind] = Path(folder) / str(len(graphs)) / "model.onnx"
                example = random_inputs(contract.graph, DENOISER_EXAMPLE_SIZES)
                export_graph(forked, contract.graph, example, graphs[kind])
                write_engine_graphs(graphs[kind])
            spinner.update(f"replaying {path.name} …")
            with EagerEngine(forked, contract.graph) as eager:
                torch_error = replay(case, eager, contract).error
            own = graphs[kind].with_name(engine_graph_file("onnxruntime"))
            with OnnxRuntimeEngine(own, contract.graph) as engine:
                ort_error = replay(case, engine, contract).error
            rows.append(
                {
                    "case": path.stem,
                    "recorded_state": case.meta["state"],
                    "torch": torch_error,
                    "onnxruntime": ort_error,
                    "tolerance": case.tolerance,
                }
            )
    grid = table("case", ">torch", ">onnxruntime", ">tolerance")
    for row in rows:
        grid.add_row(
            str(row["case"]), *(f"{row[name]:.1e}" for name in ("torch", "onnxruntime", "tolerance"))
        )
    out.print(grid)
    write_results(output, command="python -m benchmarks.golden_errors", axes=axes(), steps=28, cases=rows)
    out.print(str(output))


if __name__ == "__main__":
    main()
