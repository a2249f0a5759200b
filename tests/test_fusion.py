"""Attention compiles to fused kernels: the builder's scratch memory grows with tokens, not with their square.

Nothing here needs a GPU. One attention map of one row, at 4096 image tokens, is larger than all the scratch
memory that a fused denoiser needs; a graph that materialises maps is the control.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from filelock import FileLock

from emag_export.contract import Variant
from emag_export.engines.tensorrt.builder import build_plan
from emag_export.engines.tensorrt.flavour import flavour_of
from emag_export.engines.tensorrt.options import EngineOptions, SizeRange
from emag_export.exporter.examples import random_inputs
from emag_export.exporter.fork import ForkedSD3
from emag_export.exporter.identify import contract_of
from emag_export.exporter.onnx_export import export_graph

HEADS, TEXT = 2, 77


@pytest.fixture(scope="session")
def scratch(shared_folder: Path) -> Callable[[Variant, int], int]:
    """(variant, side in tokens) to scratch bytes of a half-precision fork with three branch rows."""
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=64,  # as in every SD3; fused kernels exist for few sizes
        num_attention_heads=HEADS,
        joint_attention_dim=64,
        caption_projection_dim=64 * HEADS,
        pooled_projection_dim=32,
        pos_embed_max_size=64,
    )
    model = model.half().eval().requires_grad_(False)

    def measure(variant: Variant, side: int) -> int:
        contract = contract_of(model.config, variant=variant, blocks=(1,), precision="float16")
        path = shared_folder / "fusion" / str(variant) / "model.onnx"
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                example = {"trunk_rows": 2, "rows": 3, "tracked": 2, "h": 4, "w": 6, "text": 5}
                export_graph(
                    ForkedSD3(model, contract).eval(),
                    contract.graph,
                    random_inputs(contract.graph, example),
                    path,
                )
        sizes = {"trunk_rows": 2, "rows": 3, "tracked": 1, "h": side, "w": side, "text": TEXT}
        profile = {name: SizeRange(min=size, opt=size, max=size) for name, size in sizes.items()}
        options = EngineOptions(targets=("sm89",))
        plan = build_plan(path, contract.graph, (profile,), flavour_of("tensorrt-rtx"), options)
        return plan.memory["scratch"]

    return measure


def one_map(side: int) -> int:
    """Bytes of the attention map of one row, all heads, half precision."""
    return HEADS * side**2 * (side**2 + TEXT) * 2


def test_query_variant_is_fused_in_every_row(scratch: Callable[[Variant, int], int]) -> None:
    small, large = scratch(Variant.EMAG_Q, 32), scratch(Variant.EMAG_Q, 64)
    assert large < 4 * small  # four times the tokens
    assert large - small < one_map(64) - one_map(32)  # less than one map for all three rows


def test_map_variant_takes_few_maps(scratch: Callable[[Variant, int], int]) -> None:
    """7.1 maps of the one tracked row for one candidate block, half of what computing with E_new takes; the
    builder gives every tile memory of its own. More than one map also shows that the gate above sees maps."""
    assert one_map(64) < scratch(Variant.EMAG, 64) < 7.5 * one_map(64)
