"""Export one component: load its weights, trace it, check the graph where that fits into memory."""

import gc
import json
from pathlib import Path

from torch import nn

from emag_export.bundle import COMPONENTS, DENOISER, GRAPH_FILE
from emag_export.contract import DenoiserContract, GraphSpec
from emag_export.exporter.components import AUXILIARY, load_transformer, load_weights
from emag_export.exporter.describe.identify import BuildPlan, BuildProgress
from emag_export.exporter.graph.examples import DENOISER_CHECK_SIZES, DENOISER_EXAMPLE_SIZES, random_inputs
from emag_export.exporter.graph.fork import ForkedSD3
from emag_export.exporter.graph.onnx_export import export_graph
from emag_export.exporter.graph.passes import write_engine_graphs
from emag_export.exporter.graph.verify import verify_graph
from emag_export.exporter.resources import VERIFIED_BYTES
from emag_export.shapes import Sizes

__all__ = ["component_spec", "export_component"]


def component_spec(plan: BuildPlan, name: str) -> GraphSpec:
    """Inputs and outputs of one component of the bundle."""
    if name == DENOISER:
        return plan.contract.graph
    auxiliary = AUXILIARY[name]
    return auxiliary.spec(name, plan.source.config(auxiliary.source), plan.contract.precision)


def export_component(plan: BuildPlan, name: str, folder: Path, on_progress: BuildProgress) -> None:
    """Write ``model.onnx``, its external data, engines' own graphs and ``config.json`` of one component.

    Args:
        plan: What is built.
        name: Folder of the component in the bundle.
        folder: Existing folder to write to.
        on_progress: Told when a phase begins, and how much was written.

    Raises:
        ModelError: If its weights cannot be loaded.
        ExportError: If tracing or checking fails.
    """
    graph = folder / GRAPH_FILE
    _write_graphs(plan, name, graph, on_progress)
    gc.collect()  # the tracer leaves cycles that hold the weights
    # Without the folder that the model was once loaded from.
    config = {
        key: value for key, value in plan.source.config(COMPONENTS[name]).items() if key != "_name_or_path"
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    written = sum(path.stat().st_size for path in folder.iterdir())
    on_progress(name, f"{written / 1e6:.1f} MB written")


def _write_graphs(plan: BuildPlan, name: str, graph: Path, on_progress: BuildProgress) -> None:
    """Load, trace and check; all weights are let go at the end."""
    precision = plan.contract.precision
    on_progress(name, "load")
    module, sizes = _load(plan, name)
    spec = component_spec(plan, name)
    on_progress(name, "trace")
    export_graph(module, spec, random_inputs(spec, sizes[0]), graph, precision=precision)
    graphs = [graph, *write_engine_graphs(graph)]
    if _bytes(module) <= VERIFIED_BYTES:
        on_progress(name, "verify")
        for checked in graphs:
            verify_graph(module, spec, checked, sizes[1:], precision)


def _load(plan: BuildPlan, name: str) -> tuple[nn.Module, tuple[Sizes, ...]]:
    """The module, the sizes to trace it at, and those to check the graph at."""
    contract = plan.contract
    if name == DENOISER:
        model = load_transformer(plan.source, contract.precision, plan.loras)
        return ForkedSD3(model, contract).eval(), _denoiser_sizes(contract)
    auxiliary = AUXILIARY[name]
    model = load_weights(
        plan.source, auxiliary.source, auxiliary.library, auxiliary.model_class, contract.precision
    )
    return auxiliary.wrap(model).eval(), (auxiliary.example, *auxiliary.check)


def _denoiser_sizes(contract: DenoiserContract) -> tuple[Sizes, ...]:
    """Grids never exceed what the positional embedding covers."""
    limit = contract.max_grid
    return tuple(
        {name: min(size, limit) if name in "hw" else size for name, size in sizes.items()}
        for sizes in (DENOISER_EXAMPLE_SIZES, *DENOISER_CHECK_SIZES)
    )


def _bytes(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())
