"""Layers of an engine, counted from reports of the shape that the engine inspector gives."""

import json

import pytest

from emag_export.engines.tensorrt.inspector import read_layers
from emag_export.errors import EngineError


def layer(
    name: str, kind: str = "kgen", dtype: str = "Half", field: str = "Format/Datatype"
) -> dict[str, object]:
    return {"Name": name, "LayerType": kind, "Outputs": [{"Name": "y", "Dimensions": [1], field: dtype}]}


# Names as public reports of TensorRT 10.10 and later show them.
REPORT = {
    "Layers": [
        layer("__myl_GathGathMulAddCastMeanSubMulMeanAddSqrtDivMulCastMulAdd_myl0_0"),
        layer("_gemm_mha_v2_myl0_3", "gemm"),
        layer("_gemm_mha_v2_myl0_9", "gemm"),
        layer("__myl_MaxSubExpSumDivMul_myl0_7", dtype="Float"),
        layer("__myl_CastTran_myl0_8"),
        layer("Reformatting CopyNode for Output Tensor 0", "Reformat", "Float", "Datatype"),
    ]
}


def test_counts() -> None:
    layers = read_layers(json.dumps(REPORT))
    assert (layers.layers, layers.fused_attention, layers.softmax) == (6, 2, 1)
    assert layers.copies == ("__myl_CastTran_myl0_8", "Reformatting CopyNode for Output Tensor 0")
    assert layers.precisions == {"Half": 4, "Float": 2}


def test_names_only() -> None:
    layers = read_layers(json.dumps({"Layers": ["_gemm_mha_v2_myl0_3", "conv"]}))
    assert (layers.layers, layers.fused_attention, layers.precisions) == (2, 1, {"unknown": 2})


@pytest.mark.parametrize("text", ["", "[]", "{}", "null"])
def test_no_report(text: str) -> None:
    with pytest.raises(EngineError, match="cannot be read"):
        read_layers(text)
