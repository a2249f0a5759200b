"""Trace a module into an ONNX file that fits its contract: named axes, no local paths, reproducible bytes."""

import contextlib
import gc
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor, nn

from emag_export.contract import GraphSpec
from emag_export.errors import ExportError
from emag_export.exporter.describe.recipes import OPSETS
from emag_export.exporter.graph.data_file import write_data
from emag_export.exporter.graph.simplify import simplify
from emag_export.exporter.source.place import Reserved
from emag_export.exporter.staging import unfinished
from emag_export.shapes import Dim

__all__ = ["Weights", "export_graph"]

EXTERNAL_DATA_BYTES = 1 << 20
"""Graphs with more weights than this keep them beside the ONNX file."""

_EMBEDDED_BYTES = 256
"""Weights of no more bytes lie in the ONNX file itself all the same."""

_SYMBOL = re.compile(r"\bs\d+\b")


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Weights that a module does not hold, what becomes of them, and who is told how far they are written."""

    reserved: Reserved | None = None
    """The place of the unread ones."""
    change: Callable[[onnx_ir.Model], object] = lambda model: None
    """Exchanges weights for others in the graph; the numbers are made when they are written."""
    told: Callable[[int, int], object] = lambda done, total: None
    """Called with bytes that are written, and bytes in all."""


def export_graph(
    module: nn.Module,
    spec: GraphSpec,
    example: Mapping[str, Tensor],
    path: Path,
    *,
    precision: str = "float32",
    weights: Weights | None = None,
) -> None:
    """Write ``module`` as ONNX, its weights one at a time.

    What an interrupted call has written of them into the same folder is checked and kept.

    Args:
        module: In eval mode; its ``forward`` takes the inputs of ``spec`` by name.
        spec: What the graph must take and give.
        example: Inputs to trace with. Sizes that differ from each other, and batches above one, keep
            dimensions from being taken for constants or for one another.
        path: The ONNX file. Large weights go to ``<name>.data`` beside it.
        precision: Of its weights, which decides the opset.
        weights: Where those are that the module does not hold; None if it holds all.

    Raises:
        ExportError: If tracing fails, the result does not fit ``spec``, or something needed the numbers of a
            weight before they were read.
    """
    weights = weights or Weights()
    dynamic = {
        tensor.name: {
            axis: torch.export.Dim.AUTO for axis, dim in enumerate(tensor.dims) if isinstance(dim, str)
        }
        for tensor in spec.inputs
    }
    opset = OPSETS[precision]
    try:
        with _quiet(), _seldom_collected(), torch.inference_mode():
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
    if weights.reserved is not None:
        weights.reserved.check()
        _read_when_written(model, weights.reserved)
    weights.change(model)
    ClearMetadataAndDocStringPass()(model)
    _save(model, path, weights)
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


@contextlib.contextmanager
def _seldom_collected() -> Iterator[None]:
    """Look for garbage a hundred times less often: tracing makes many objects that live, 15 % faster so."""
    before = gc.get_threshold()
    gc.set_threshold(100 * before[0], *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


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
    whole: str = dim.value
    return _SYMBOL.sub(lambda match: _named(match[0], whole, names), whole)


def _named(symbol: str, whole: str, names: Mapping[str, str]) -> str:
    """A symbol's name, in brackets where it is an expression within another one."""
    name = names.get(symbol, symbol)
    return name if name.isidentifier() or symbol == whole else f"({name})"


def _save(model: Any, path: Path, weights: Weights) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = [value for graph in model.graphs() for value in graph.initializers.values() if value.const_value]
    if sum(value.const_value.nbytes for value in values) > EXTERNAL_DATA_BYTES:
        external = [value for value in values if value.const_value.nbytes > _EMBEDDED_BYTES]
        with unfinished(path.parent) as folder:
            data = write_data(
                [value.const_value for value in external], folder / f"{path.name}.data", weights.told
            )
            (folder / f"{path.name}.data").replace(path.with_name(f"{path.name}.data"))
        for value, tensor in zip(external, data, strict=True):
            value.const_value = tensor
    onnx_ir.save(model, path)


def _read_when_written(model: Any, reserved: Reserved) -> None:
    """Put into the place of every unread weight what reads it; transposes that were folded are applied."""
    for value in model.graph.initializers.values():
        tensor = value.const_value
        read = None if tensor is None else reserved.reader(tensor.numpy())
        if read is not None:
            value.const_value = onnx_ir.LazyTensor(
                lambda read=read, name=value.name: TorchTensor(read(), name=name),
                dtype=tensor.dtype,
                shape=tensor.shape,
                name=value.name,
            )


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
