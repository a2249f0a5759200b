"""Replay golden cases: ``python -m tests.golden CASE.npz … [MODEL_DIR] --engine torch|onnxruntime``."""

import sys
import tempfile
from pathlib import Path

import click
import diffusers
import numpy as np

from emag_export.contract import DenoiserContract
from emag_export.engines.eager import EagerEngine
from emag_export.engines.ort import OnnxRuntimeEngine
from emag_export.engines.protocol import Engine
from emag_export.exporter.graph.examples import random_inputs
from emag_export.exporter.graph.export import denoiser_sizes
from emag_export.exporter.graph.fork import Forked, fork
from emag_export.exporter.graph.onnx_export import export_graph
from emag_export.families import FAMILIES
from tests.golden.case import GoldenCase, Replay, replay
from tests.golden.family_case import FamilyCase, replay_family

Case = GoldenCase | FamilyCase


@click.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--engine", "backend", type=click.Choice(["torch", "onnxruntime"]), default="onnxruntime")
@click.option(
    "--select", is_flag=True, help="Choose blocks by our own rule instead of replaying the recorded choice."
)
def main(paths: tuple[Path, ...], backend: str, select: bool) -> None:
    """Print the largest absolute difference of the latents over all steps; exit 1 if one is too large.

    PATHS are recordings, and at most one folder with their model; without it, the model is looked for beside
    each recording and one folder above.
    """
    folders = [path for path in paths if path.is_dir()]
    if len(folders) > 1:
        raise click.UsageError("give one folder with a model, or none")
    failed = False
    for path in paths:
        if path.is_file():
            failed |= not _passes(path, folders[0] if folders else None, backend, select=select)
    sys.exit(failed)


def _passes(path: Path, model: Path | None, backend: str, *, select: bool) -> bool:
    case = load(path)
    forked = fork_of(case, model or _model_beside(path, case))
    result = replayed(case, forked, backend, select=select)
    passed = result.error <= case.tolerance
    click.echo(
        f"{path.name} on {backend}: {result.error:.2e} (tolerance {case.tolerance:.0e}) "
        f"{'ok' if passed else 'FAILED'}"
    )
    return passed


def load(path: Path) -> Case:
    """A recording of either format."""
    with np.load(path) as file:
        new = '"family"' in str(file["meta"])
    return FamilyCase.load(path) if new else GoldenCase.load(path)


def fork_of(case: Case, folder: Path) -> Forked:
    """The recorded model, forked as it was recorded."""
    family = FAMILIES[case.meta.get("family", "sd3")]
    model = getattr(diffusers, family.transformer).from_pretrained(folder).eval().requires_grad_(False)
    contract = family.contract(model.config, variant=case.variant, blocks=case.blocks, renorm=case.renorm)
    return fork(model, contract)


def replayed(case: Case, forked: Forked, backend: str, *, select: bool = False) -> Replay:
    """What a backend makes of a recording."""
    contract = forked.contract
    with tempfile.TemporaryDirectory() as folder:
        engine: Engine
        if backend == "torch":
            engine = EagerEngine(forked, contract.graph)
        else:
            path = Path(folder) / "model.onnx"
            export_graph(forked, contract.graph, random_inputs(contract.graph, _example(contract)), path)
            engine = OnnxRuntimeEngine(path, contract.graph)
        with engine:
            if isinstance(case, FamilyCase):
                return replay_family(case, engine, contract)
            return replay(case, engine, contract, select=select)


def _example(contract: DenoiserContract) -> dict[str, int]:
    return dict(denoiser_sizes(contract)[0])


def _model_beside(path: Path, case: Case) -> Path:
    name: str = case.meta.get("model", "mmdit")
    for folder in (path.parent / name, path.parent.parent / name):
        if folder.is_dir():
            return folder
    raise click.UsageError(f"no folder {name} with the model beside {path}; give it as another argument")


if __name__ == "__main__":
    main()
