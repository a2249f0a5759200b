"""Recordings of either format: read, their model forked, and replayed on a backend."""

import tempfile
from pathlib import Path

import diffusers

from emag_export.engines.eager import EagerEngine
from emag_export.engines.ort import OnnxRuntimeEngine
from emag_export.engines.protocol import Engine
from emag_export.exporter.graph.examples import random_inputs
from emag_export.exporter.graph.export import denoiser_sizes
from emag_export.exporter.graph.fork import Forked, fork
from emag_export.exporter.graph.onnx_export import export_graph
from emag_export.families import FAMILIES
from tests.golden.case import GoldenCase, Replay, read, replay
from tests.golden.family_case import FamilyCase, replay_family

__all__ = ["BACKENDS", "Case", "fork_of", "load", "model_beside", "replayed"]

BACKENDS = ("torch", "onnxruntime")

Case = GoldenCase | FamilyCase


def load(path: Path) -> Case:
    """A recording of either format."""
    meta, arrays = read(path)
    kind = FamilyCase if "family" in meta else GoldenCase
    return kind(meta=meta, arrays=arrays)


def model_beside(path: Path, case: Case) -> Path:
    """The folder of a recording's model: beside it, or one folder above.

    Raises:
        FileNotFoundError: If it is in neither.
    """
    name: str = case.meta.get("model", "mmdit")
    for folder in (path.parent / name, path.parent.parent / name):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"no folder {name} with the model beside {path}; give it as another argument")


def fork_of(case: Case, folder: Path) -> Forked:
    """The recorded model, forked as it was recorded."""
    family = FAMILIES[case.meta.get("family", "sd3")]
    model = getattr(diffusers, family.transformer).from_pretrained(folder).eval().requires_grad_(False)
    contract = family.contract(model.config, variant=case.variant, blocks=case.blocks, renorm=case.renorm)
    return fork(model, contract)


def replayed(case: Case, forked: Forked, backend: str, *, select: bool = False) -> Replay:
    """What a backend makes of a recording.

    Args:
        case: The recording.
        forked: Its model.
        backend: One of :data:`BACKENDS`.
        select: Choose blocks by our own rule; cases of other families always do.
    """
    contract = forked.contract
    with tempfile.TemporaryDirectory() as folder:
        engine: Engine
        if backend == "torch":
            engine = EagerEngine(forked, contract.graph)
        else:
            path, example = Path(folder) / "model.onnx", denoiser_sizes(contract)[0]
            export_graph(forked, contract.graph, random_inputs(contract.graph, example), path)
            engine = OnnxRuntimeEngine(path, contract.graph)
        with engine:
            if isinstance(case, FamilyCase):
                return replay_family(case, engine, contract)
            return replay(case, engine, contract, select=select)
