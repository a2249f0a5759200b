"""What the engine inspector of a loaded engine says about fusion, copies and precision."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from emag_export.errors import EngineError

__all__ = ["EngineLayers", "read_layers"]

# Names as TensorRT's compiler makes them: a fused kernel is called after what it fuses, each operation by
# its first letters (``__myl_MaxSubExpSumDivMul_myl0_7``); attention is called ``_gemm_mha_v2_myl0_3``.
_ATTENTION = re.compile(r"mha|flash|sdpa|attention", re.IGNORECASE)
_SOFTMAX = re.compile(r"softmax|MaxSubExp", re.IGNORECASE)
_COPY = re.compile(r"^__myl_(Cast|Tran|Move|Resh|Repl|Conc|Slic)+_myl|Reformat|CopyNode", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class EngineLayers:
    """Counts over the layers of an engine."""

    layers: int
    fused_attention: int
    """Layers that are a fused attention kernel."""
    softmax: int
    """Layers that are a softmax of their own: attention that is not fused leaves them behind."""
    copies: tuple[str, ...]
    """Names of layers that only cast, copy or transpose."""
    precisions: Mapping[str, int]
    """Data type of the first output to the number of layers that have it."""


def read_layers(text: str) -> EngineLayers:
    """Count the layers in the inspector's JSON.

    Raises:
        EngineError: If it is no such JSON; an engine built without detailed verbosity lists names only.
    """
    try:
        layers = json.loads(text)["Layers"]
    except (ValueError, KeyError, TypeError) as error:
        raise EngineError(f"the engine inspector's report cannot be read: {error}") from error
    rows = [layer if isinstance(layer, dict) else {"Name": str(layer)} for layer in layers]
    names = [_names(row) for row in rows]
    return EngineLayers(
        layers=len(rows),
        fused_attention=sum(bool(_ATTENTION.search(name)) for name in names),
        softmax=sum(bool(_SOFTMAX.search(n)) and not _ATTENTION.search(n) for n in names),
        copies=tuple(str(row.get("Name", "")) for row, n in zip(rows, names, strict=True) if _is_copy(n)),
        precisions=dict(Counter(_precision(row) for row in rows)),
    )


def _names(layer: Mapping[str, Any]) -> str:
    return " ".join(str(layer.get(field, "")) for field in ("Name", "LayerType", "TacticName"))


def _is_copy(names: str) -> bool:
    return bool(_COPY.search(names)) and not _ATTENTION.search(names)


def _precision(layer: Mapping[str, Any]) -> str:
    outputs = layer.get("Outputs") or [{}]
    first = outputs[0] if isinstance(outputs[0], dict) else {}
    return str(first.get("Datatype") or first.get("Format/Datatype") or "unknown")
