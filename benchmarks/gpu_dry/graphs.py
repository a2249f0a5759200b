"""The graphs of the dry run: tiny-sd3's transformer as a bundle holds it, and a control that must fail."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from emag_export.bundle import DENOISER, GRAPH_FILE, Bundle, engine_graph_file
from emag_export.contract import GraphSpec, TensorSpec
from emag_export.exporter.build import build
from emag_export.exporter.graph.onnx_export import export_graph
from emag_export.hashing import hash_files
from emag_export.kinds import Variant
from emag_export.options import BuildOptions

__all__ = ["DryGraph", "control_graph", "denoiser_graphs"]

_SOURCES = Path(__file__).parent.parent.parent / "emag_export"
_EXPORTING = ("*.py", "exporter/**/*.py", "families/**/*.py")
_VARIANTS = (Variant.EMAG_Q, Variant.EMAG)
_PRECISIONS = ("fp32", "fp16")


@dataclass(frozen=True, kw_only=True)
class DryGraph:
    """A graph to run over the stub libraries."""

    name: str
    path: Path
    spec: GraphSpec


def denoiser_graphs(folder: Path, on_progress: Callable[[str], None]) -> list[DryGraph]:
    """Export what is not there yet; everything again when a source file that graphs are made by has changed.

    Args:
        folder: For the bundles, which hold the transformer alone.
        on_progress: Told which one is being exported.
    """
    stamp = folder / "sources.sha256"
    files = [path for pattern in _EXPORTING for path in sorted(_SOURCES.glob(pattern))]
    sources = hash_files(_SOURCES, files)
    if not stamp.exists() or stamp.read_text("utf-8") != sources:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        stamp.write_text(sources, "utf-8")
    graphs = []
    for variant in _VARIANTS:
        for precision in _PRECISIONS:
            name = f"{variant} {precision}"
            on_progress(name)
            bundle = _bundle(folder / f"{variant}-{precision}", variant, precision)
            spec = bundle.spec(DENOISER)
            for file in (GRAPH_FILE, engine_graph_file("onnxruntime")):
                graphs.append(
                    DryGraph(name=f"{name} {Path(file).stem}", path=bundle.path / DENOISER / file, spec=spec)
                )
    return graphs


def _bundle(folder: Path, variant: Variant, precision: str) -> Bundle:
    options = BuildOptions(variant=variant, precision=precision, components=(DENOISER,))
    return build("tiny-sd3", folder, options)


class _Offset(nn.Module):
    """Adds a size to a range: onnxruntime keeps the one on the CPU and the other on the GPU."""

    def forward(self, x: Tensor, last: Tensor) -> Tensor:
        count = last.shape[0]
        return x.index_select(0, torch.arange(count) + (x.shape[0] - count)) + last


def control_graph(folder: Path) -> DryGraph:
    """A graph that cannot be captured, as the denoiser once could not."""
    x, last, y = (
        TensorSpec(name=name, dtype="float32", dims=(rows, 3))
        for name, rows in (("x", "rows"), ("last", "tracked"), ("y", "tracked"))
    )
    spec = GraphSpec(name="control", inputs=(x, last), outputs=(y,))
    path = folder / "model.onnx"
    export_graph(_Offset().eval(), spec, {"x": torch.ones(4, 3), "last": torch.ones(2, 3)}, path)
    return DryGraph(name="control", path=path, spec=spec)
