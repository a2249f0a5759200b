"""What the runner is told: a graph, the project's provider options, buffers, and a sequence of calls."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from benchmarks.gpu_dry.graphs import DryGraph
from benchmarks.gpu_dry.stub_libraries import CUDA_RUNTIME
from emag_export.contract import STATE_PAIRS, GraphSpec, TensorSpec
from emag_export.engines.ort_providers import CUDA, provider_options
from emag_export.shapes import Sizes, evaluate

__all__ = ["RUNS", "describe"]

_ELEMENT_TYPES = {"float32": 1, "int64": 7, "float16": 10, "bfloat16": 16}
"""ONNX TensorProto element types."""

_SIZES: Mapping[str, Sizes] = MappingProxyType(
    {
        "guide": {"trunk_rows": 2, "rows": 3, "tracked": 1, "text": 30, "h": 8, "w": 8},
        "track": {"trunk_rows": 2, "rows": 2, "tracked": 1, "text": 30, "h": 8, "w": 8},
        "wide": {"trunk_rows": 4, "rows": 6, "tracked": 2, "text": 17, "h": 5, "w": 7},
    }
)
"""Two phases of one run, and another picture size with an odd grid."""

_PARITIES = {"a>b": ("a", "b"), "b>a": ("b", "a")}
"""Averages are read from one buffer and written to the other, which then take turns."""

RUNS: tuple[tuple[str, str, int], ...] = (
    ("plain", "guide a>b", -1),
    ("plain", "guide b>a", -1),
    ("capture", "guide a>b", 1),
    ("replay", "guide a>b", 1),
    ("capture", "guide b>a", 2),
    ("plain", "wide a>b", -1),
    ("replay", "guide a>b", 1),
    ("plain", "track a>b", -1),
    ("capture", "track a>b", 3),
    ("capture", "wide b>a", 4),
    ("replay", "guide b>a", 2),
    ("replay", "track a>b", 3),
    ("replay", "wide b>a", 4),
    ("replay", "guide a>b", 1),
)
"""What is expected of a call, sizes and parity, ``gpu_graph_id``: -1 is a call without CUDA graphs."""


def describe(graph: DryGraph) -> dict[str, Any]:
    """The job of one graph, as plain data."""
    buffers: dict[str, int] = {}
    calls = {
        f"{name} {parity}": _call(graph.spec, name, parity, buffers)
        for name in _SIZES
        for parity in _PARITIES
    }
    return {
        "runtime": CUDA_RUNTIME,
        "graph": str(Path(graph.path).resolve()),
        # The runner puts the handle of its own stream in.
        "options": provider_options(CUDA, torch.device("cuda", 0), 0, cuda_graphs=True),
        "buffers": buffers,
        "calls": calls,
        "runs": [{"kind": kind, "call": call, "id": number} for kind, call, number in RUNS],
    }


def _call(spec: GraphSpec, name: str, parity: str, buffers: dict[str, int]) -> dict[str, Any]:
    """Where each input and output lies; ``buffers`` is told how many bytes that takes."""
    sizes = _SIZES[name]
    read, written = _PARITIES[parity]
    averages = {**dict.fromkeys(STATE_PAIRS, read), **dict.fromkeys(STATE_PAIRS.values(), written)}

    def placed(tensor: TensorSpec) -> list[Any]:
        buffer = f"{name} {averages.get(tensor.name, tensor.name)}"
        buffers[buffer] = tensor.nbytes(sizes)
        return [buffer, _ELEMENT_TYPES[tensor.dtype], list(evaluate(tensor.dims, sizes))]

    return {
        "inputs": {tensor.name: placed(tensor) for tensor in spec.inputs},
        "outputs": {tensor.name: placed(tensor) for tensor in spec.outputs},
    }
