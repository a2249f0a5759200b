"""Check an exported graph against the module it came from, at sizes that are not the example's."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from emag_export.contract import GraphSpec
from emag_export.engines.eager import EagerEngine
from emag_export.engines.ort import OnnxRuntimeEngine
from emag_export.engines.protocol import TORCH_DTYPES
from emag_export.errors import ExportError
from emag_export.exporter.graph.examples import random_inputs
from emag_export.exporter.graph.upcast import upcast_graph, upcast_spec
from emag_export.quantisation import Scheme
from emag_export.shapes import Sizes

__all__ = ["QUANTISED_TOLERANCES", "TOLERANCES", "verify_graph"]

TOLERANCES = {"float32": 1e-4, "float16": 3e-2, "bfloat16": 6e-2}
"""Largest error relative to the largest output. Float32: measured 3e-6 on models of ten blocks, and matrix
products of real width add in another order. Float16: one unit in the last place is 1e-3 of a value, and
onnxruntime's CPU provider computes in float32 between casts where PyTorch rounds after every operator.
Bfloat16: a unit is 8e-3; measured 1.8e-2 against PyTorch, which rounds as often as in float16. Wrong axes or
wrong crops show as errors of order one."""

QUANTISED_TOLERANCES: Mapping[Scheme, float] = {Scheme.W8: 0.1, Scheme.FP8: 0.4, Scheme.INT8: 0.2}
"""What a scheme may add to that. Wide: the largest of many random numbers counts, and untrained models round
worse than trained ones: this finds wrong axes, which show as errors of order one; ``compare`` judges."""


def verify_graph(
    module: nn.Module,
    spec: GraphSpec,
    graph: Path,
    sizes: Iterable[Sizes],
    precision: str,
    scheme: Scheme | None = None,
) -> None:
    """Run a graph and its module at these sizes, and compare every output.

    onnxruntime's CPU provider does not run bfloat16: of such a graph a float32 copy is run, with the same
    rounded weights.

    Args:
        module: What was exported.
        spec: Its contract.
        graph: The ONNX file.
        sizes: Sizes of the named dimensions, none of them the example's.
        precision: Of the graph; its tolerance is looked up.
        scheme: Of its quantisation, which allows more.

    Raises:
        ExportError: If an output differs by more than the tolerance.
    """
    with EagerEngine(module, spec) as eager, _runnable(graph, spec, precision) as exported:
        dtypes = {tensor.name: TORCH_DTYPES[tensor.dtype] for tensor in exported.spec.inputs}
        for seed, size in enumerate(sizes, start=1):
            feeds = random_inputs(spec, size, seed=seed)
            wanted = eager.run(feeds)
            got = exported.run({name: tensor.to(dtypes[name]) for name, tensor in feeds.items()})
            for name, expected in wanted.items():
                scale = expected.float().abs().max().clamp_min(torch.finfo(torch.float32).tiny)
                error = float((got[name].float() - expected.float()).abs().max() / scale)
                # An average kept in float16 may be rounded to either of two neighbours, one unit apart.
                rounding = 0.0 if scheme is None else QUANTISED_TOLERANCES[scheme]
                allowed = TOLERANCES[precision] + rounding + torch.finfo(expected.dtype).eps
                if not error <= allowed:
                    raise ExportError(
                        f"{spec.name} differs from PyTorch: {name} by {error:.1e} of its largest value at "
                        f"{dict(size)}, {allowed:.0e} is allowed; please report this model"
                    )


@contextmanager
def _runnable(graph: Path, spec: GraphSpec, precision: str) -> Iterator[OnnxRuntimeEngine]:
    if precision != "bfloat16":
        with OnnxRuntimeEngine(graph, spec) as engine:
            yield engine
        return
    with TemporaryDirectory(dir=graph.parent, prefix=".float32-") as folder:
        copy = Path(folder) / graph.name
        upcast_graph(graph, copy)
        with OnnxRuntimeEngine(copy, upcast_spec(spec)) as engine:
            yield engine
