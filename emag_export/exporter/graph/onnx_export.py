"""Trace a module into an ONNX file that fits its contract: named axes, no local paths, reproducible bytes."""

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import Tensor, nn

from emag_export.contract import GraphSpec
from emag_export.errors import ExportError
from emag_export.exporter.describe.recipes import OPSETS
from emag_export.exporter.graph.simplify import simplify
from emag_export.shapes import Dim

__all__ = ["export_graph"]

EXTERNAL_DATA_BYTES = 1 << 20
"""Graphs with more weights than this keep them beside the ONNX file."""

_SYMBOL = re.compile(r"\bs\d+\b")


def export_graph(
    module: nn.Module,
    spec: GraphSpec,
    example: Mapping[str, Tensor],
    path: Path,
    *,
    precision: str = "float32",
) -> None:
    """Write ``module`` as ONNX.

    Args:
        module: In eval mode; its ``forward`` takes the inputs of ``spec`` by name.
        spec: What the graph must take and give.
        example: Inputs to trace with. Sizes that differ from each other, and batches above one, keep
            dimensions from being taken for constants or for one another.
        path: The ONNX file. Large weights go to ``<name>.data`` beside it.
        precision: Of its weights, which decides the opset.

    Raises:
        ExportError: If tracing fails, or the result does not fit ``spec``.
    """
    dynamic = {
        tensor.name: {
            axis: torch.export.Dim.AUTO for axis, dim in enumerate(tensor.dims) if isinstance(dim, str)
        }
        for tensor in spec.inputs
    }
    opset = OPSETS[precision]
    try:
        with _quiet(), torch.inference_mode():
            program = torch.onnx.export(
                module,
                (),
                kwargs=dict(example),
                dynamic_shapes=dynamic,
                input_names=[tensor.name for tensor in spec.inputs],
                output_names=[tensor.name for tensor in spec.outputs],
                opset_version=opset,
                dynamo=True,
                optimize=False,
                verbose=False,
            )
    except Exception as error:
        raise ExportError(f"{spec.name} could not be traced: {error}") from error
    if program is None:
        raise ExportError(f"torch.onnx.export returned nothing for {spec.name}")
    model = program.model
    if model.opset_imports[""] != opset:
        raise ExportError(f"{spec.name} came out at opset {model.opset_imports['']}, {opset} was asked for")
    simplify(model)
    _name_axes(model, spec)
    ClearMetadataAndDocStringPass()(model)
    _save(model, path)
    _check(path, spec)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the tracer's progress prints and its notes about packages it does not need."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "torch.fx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _name_axes(model: Any, spec: GraphSpec) -> None:
    """Replace the tracer's symbols (``s33``) by the contract's names in every value of the graph."""
    names: dict[str, str] = {}
    for value, tensor in zip(model.graph.inputs, spec.inputs, strict=True):
        for dim, name in zip(value.shape, tensor.dims, strict=True):
            if isinstance(name, str) and isinstance(dim, onnx_ir.SymbolicDim) and dim.value:
                names.setdefault(dim.value, name)
    for value in _values(model.graph):
        if value.shape is not None:
            value.shape = onnx_ir.Shape([_renamed(dim, names) for dim in value.shape])
    for values, tensors in ((model.graph.inputs, spec.inputs), (model.graph.outputs, spec.outputs)):
        for value, tensor in zip(values, tensors, strict=True):
            value.shape = onnx_ir.Shape(list(tensor.dims))


def _values(graph: Any) -> Iterator[Any]:
    yield from graph.inputs
    for node in graph.all_nodes():
        yield from node.outputs


def _renamed(dim: Any, names: Mapping[str, str]) -> Dim | None:
    if isinstance(dim, int):
        return dim
    if dim.value is None:
        return None

    def named(match: re.Match[str]) -> str:
        name = names.get(match[0], match[0])
        return name if name.isidentifier() or match[0] == dim.value else f"({name})"

    return _SYMBOL.sub(named, dim.value)


def _save(model: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = sum(
        value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value
    )
    external = f"{path.name}.data" if weights > EXTERNAL_DATA_BYTES else None
    onnx_ir.save(model, path, external_data=external)


def _check(path: Path, spec: GraphSpec) -> None:
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        raise ExportError(f"{path} does not pass onnx.checker: {error}") from error
    graph = onnx.load(str(path), load_external_data=False).graph
    for values, tensors in ((graph.input, spec.inputs), (graph.output, spec.outputs)):
        got = [(value.name, _dtype(value)) for value in values]
        wanted = [(tensor.name, tensor.dtype) for tensor in tensors]
        if got != wanted:
            raise ExportError(f"{spec.name} came out with {got}, its contract says {wanted}")


def _dtype(value: onnx.ValueInfoProto) -> str:
    names = {"FLOAT": "float32", "FLOAT16": "float16", "BFLOAT16": "bfloat16", "INT64": "int64"}
    name = str(onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type))
    return names.get(name, name)
