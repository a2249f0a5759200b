"""Export one component: trace it, write its weights one at a time, check the graph where that fits."""

import gc
import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import nn

from emag_export.bundle import DENOISER, GRAPH_FILE
from emag_export.contract import DenoiserContract, GraphSpec
from emag_export.exporter.describe.identify import BuildPlan
from emag_export.exporter.graph.examples import DENOISER_CHECK_SIZES, DENOISER_EXAMPLE_SIZES, random_inputs
from emag_export.exporter.graph.fork import fork
from emag_export.exporter.graph.onnx_export import Weights, export_graph
from emag_export.exporter.graph.passes import write_engine_graphs
from emag_export.exporter.graph.verify import verify_graph
from emag_export.exporter.quantise.apply import quantise
from emag_export.exporter.resources import VERIFIED_BYTES, require_whole
from emag_export.exporter.source.load import load_transformer, open_component, open_transformer, wrapped
from emag_export.exporter.source.place import Reserved
from emag_export.progress import Event, Progress
from emag_export.shapes import Sizes
from emag_export.sizes import whole_sizes

__all__ = ["component_spec", "denoiser_sizes", "export_component"]


def component_spec(plan: BuildPlan, name: str) -> GraphSpec:
    """Inputs and outputs of one component of the bundle."""
    if name == DENOISER:
        return plan.contract.graph
    component = plan.source.family.component(name)
    return component.spec(name, plan.source.config(component.folder), plan.contract.precision)


def export_component(
    plan: BuildPlan,
    name: str,
    folder: Path,
    progress: Progress,
    ranges: Mapping[str, float] = MappingProxyType({}),
) -> None:
    """Write ``model.onnx``, its external data, engines' own graphs and ``config.json`` of one component.

    Args:
        plan: What is built.
        name: Folder of the component in the bundle.
        folder: Existing folder to write to.
        progress: Told when a phase begins, and how much was written.
        ranges: Of the denoiser's activations, where it is quantised with some.

    Raises:
        ModelError: If its weights cannot be loaded.
        ExportError: If tracing or checking fails.
    """
    _write_graphs(plan, name, folder / GRAPH_FILE, progress, ranges)
    gc.collect()  # the tracer leaves cycles that hold the weights
    source = plan.source
    # Without the folder that the model was once loaded from.
    config = {
        key: value
        for key, value in source.config(source.family.folders[name]).items()
        if key != "_name_or_path"
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    written = sum(path.stat().st_size for path in folder.iterdir())
    progress(Event(component=name, phase="written", bytes=written))


def _write_graphs(
    plan: BuildPlan, name: str, graph: Path, progress: Progress, ranges: Mapping[str, float]
) -> None:
    """Trace and write without the large weights, then check with them where they fit; all are let go."""
    precision, spec = plan.contract.precision, component_spec(plan, name)
    progress(Event(component=name, phase="load"))
    module, reserved, sizes = _open(plan, name)
    large = _bytes(module)
    progress(Event(component=name, phase="trace"))

    def told(done: int, total: int) -> None:
        progress(Event(component=name, phase="write", done=done, total=total))

    quantisation = plan.quantisation if name == DENOISER else None
    weights = Weights(reserved=reserved, told=told)
    if quantisation is not None:
        weights = replace(weights, change=partial(quantise, quantisation=quantisation, ranges=ranges))
    export_graph(module, spec, random_inputs(spec, sizes[0]), graph, precision=precision, weights=weights)
    graphs = [graph, *write_engine_graphs(graph)]
    if large <= VERIFIED_BYTES:
        progress(Event(component=name, phase="verify"))
        if reserved is not None:
            del module, reserved, weights
            module, _ = _load(plan, name)
        for checked in graphs:
            scheme = None if quantisation is None else quantisation.scheme
            verify_graph(module, spec, checked, sizes[1:], precision, scheme)


def _open(plan: BuildPlan, name: str) -> tuple[nn.Module, Reserved | None, tuple[Sizes, ...]]:
    """The module, its unread weights, the sizes to trace it at, and those to check the graph at.

    Sources that must be loaded as a whole have no unread weights, and are refused if the memory is not there.
    """
    contract = plan.contract
    opened: tuple[Any, Reserved] | None
    if name == DENOISER:
        sizes = denoiser_sizes(contract)
        shift = plan.provenance.timestep_shift
        opened = open_transformer(plan.source, contract.precision, plan.loras, timestep_shift=shift)
        if opened is not None:
            return fork(opened[0], contract), opened[1], sizes
    else:
        component = plan.source.family.component(name)
        sizes = (component.example, *component.check)
        opened = open_component(plan.source, component, contract.precision)
        if opened is not None:
            return *opened, sizes
    require_whole(plan, name)
    module, sizes = _load(plan, name)
    return module, None, sizes


def _load(plan: BuildPlan, name: str) -> tuple[nn.Module, tuple[Sizes, ...]]:
    """The module with all its weights, the sizes to trace it at, and those to check the graph at."""
    contract = plan.contract
    if name == DENOISER:
        model = load_transformer(
            plan.source,
            contract.precision,
            plan.loras,
            timestep_shift=plan.provenance.timestep_shift,
        )
        return fork(model, contract), denoiser_sizes(contract)
    component = plan.source.family.component(name)
    return wrapped(plan.source, component, contract.precision), (component.example, *component.check)


def denoiser_sizes(contract: DenoiserContract) -> tuple[Sizes, ...]:
    """Sizes to trace a denoiser at, the first ones, and to check it at.

    They never exceed what the model can take, and name only what its graph has.
    """
    limited = (
        {name: min(sizes[name], contract.limits.get(name, sizes[name])) for name in contract.graph.symbols}
        for sizes in (DENOISER_EXAMPLE_SIZES, *DENOISER_CHECK_SIZES)
    )
    return tuple(whole_sizes(contract, sizes) for sizes in limited)


def _bytes(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())
