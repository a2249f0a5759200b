"""Numbers that stand for how graphs are made: part of a bundle's key, so that a new way makes new bundles."""

from collections.abc import Mapping
from types import MappingProxyType

__all__ = ["GRAPHS", "OPSETS", "PREVIEW_FIT", "QUANTISED"]

OPSETS: Mapping[str, int] = MappingProxyType({"float32": 20, "float16": 20, "bfloat16": 22})
"""Precision to the opset of its graphs. 20 is the oldest with ``Gelu`` as one operator, and runs on
onnxruntime, TensorRT and TensorRT-RTX alike; 22 is the oldest in which ``Conv`` takes bfloat16."""

GRAPHS = 3
"""Raised when the same model and options give another graph than before: a change of the fork, of a rule of
:mod:`emag_export.exporter.graph.passes`, of how things are traced."""

PREVIEW_FIT = 1
"""Raised when the fit of the previews changes: a bundle with the older numbers, or none, is made again."""

QUANTISED = 1
"""Raised when the same scheme rounds otherwise than before, or ranges are measured otherwise."""
