"""Replay one golden case: ``python -m tests.golden CASE.npz MODEL_DIR --engine torch|onnxruntime``."""

import sys
import tempfile
from pathlib import Path

import click
from diffusers import SD3Transformer2DModel

from emag_export.engines.eager import EagerEngine
from emag_export.engines.ort import OnnxRuntimeEngine
from emag_export.engines.protocol import Engine
from emag_export.exporter.graph.examples import DENOISER_EXAMPLE_SIZES, random_inputs
from emag_export.exporter.graph.fork import fork
from emag_export.exporter.graph.onnx_export import export_graph
from emag_export.families import FAMILIES
from tests.golden.case import GoldenCase, replay


@click.command()
@click.argument("case_file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("model_dir", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--engine", "backend", type=click.Choice(["torch", "onnxruntime"]), default="onnxruntime")
@click.option(
    "--select", is_flag=True, help="Choose blocks by our own rule instead of replaying the recorded choice."
)
def main(case_file: Path, model_dir: Path, backend: str, select: bool) -> None:
    """Print the largest absolute difference of the latents over all steps; exit 1 above the tolerance."""
    case = GoldenCase.load(case_file)
    model = SD3Transformer2DModel.from_pretrained(model_dir).eval()
    contract = FAMILIES["sd3"].contract(
        model.config, variant=case.variant, blocks=case.blocks, renorm=case.renorm
    )
    forked = fork(model, contract)
    with tempfile.TemporaryDirectory() as folder:
        engine: Engine
        if backend == "torch":
            engine = EagerEngine(forked, contract.graph)
        else:
            path = Path(folder) / "model.onnx"
            export_graph(forked, contract.graph, random_inputs(contract.graph, DENOISER_EXAMPLE_SIZES), path)
            engine = OnnxRuntimeEngine(path, contract.graph)
        with engine:
            result = replay(case, engine, contract, select=select)
    verdict = "ok" if result.error <= case.tolerance else "FAILED"
    click.echo(
        f"{case_file.name} on {backend}: {result.error:.2e} (tolerance {case.tolerance:.0e}) {verdict}"
    )
    sys.exit(result.error > case.tolerance)


if __name__ == "__main__":
    main()
