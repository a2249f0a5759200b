"""Scratch memory of small denoisers, which tells without a GPU whether attention is fused.

``python -m benchmarks.fusion`` builds with TensorRT-RTX for sm89; nothing is run. It writes ``fusion.json``:
bytes, and how many attention maps of one row, all heads, half precision, that is.
"""

import argparse
import tempfile
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import diffusers
import torch
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from rich.console import Console

from benchmarks.masked import masked_fork
from benchmarks.results import FOLDER, write_results
from emag_export.contract import DenoiserContract
from emag_export.engines.tensorrt.builder import build_plan
from emag_export.engines.tensorrt.flavour import flavour_of
from emag_export.engines.tensorrt.options import EngineOptions, SizeRange
from emag_export.exporter.graph.examples import random_inputs
from emag_export.exporter.graph.fork import Forked, fork
from emag_export.exporter.graph.onnx_export import export_graph
from emag_export.exporter.source.random_weights import random_component
from emag_export.families import FAMILIES
from emag_export.kinds import Variant

TEXT = 96
"""Text tokens; a multiple of 32, as some models fill up others."""
RESULTS = FOLDER / "fusion.json"
_EXAMPLE = {"trunk_rows": 2, "rows": 3, "tracked": 2, "h": 4, "w": 6, "text": 5}
_SIDES = (32, 64)
_CASES = (
    (Variant.EMAG_Q, 2, (1,), False),
    (Variant.EMAG_Q, 2, (1,), True),
    (Variant.EMAG, 2, (1,), False),
    (Variant.EMAG, 2, (1,), True),
    (Variant.EMAG, 8, (1,), False),
    (Variant.EMAG, 8, (1, 2), False),
)
"""Variant, heads, candidate blocks, and whether text is padded behind a mask; of SD3."""

OTHERS: Mapping[str, tuple[str, Mapping[str, int]]] = MappingProxyType(
    {
        "flux": ("flux-narrow", {"num_layers": 2, "num_single_layers": 1}),
        "z_image": ("z-image-narrow", {"n_layers": 3}),
        "qwen_image": ("qwen-narrow", {"num_layers": 3}),
    }
)
"""Family to a model with random weights, and what makes three blocks of it."""


def axes() -> dict[str, Any]:
    """What is varied."""
    cases = [*(_named(*case) for case in _CASES), *map(_of_family, OTHERS)]
    return {"case": cases, "tokens": [side**2 for side in _SIDES]}


def _named(variant: Variant, heads: int, blocks: tuple[int, ...], masked: bool) -> dict[str, Any]:
    return {"variant": str(variant), "heads": heads, "candidates": len(blocks), "masked": masked}


def _of_family(family: str) -> dict[str, Any]:
    masked = any(spec.is_mask for spec in family_fork(family).contract.conditioning)
    return {**_named(Variant.EMAG_Q, 2, (1,), masked), "family": family}


@cache
def family_fork(family: str) -> Forked:
    """Three blocks of another family in half precision, the second one a candidate; heads as published."""
    model, layers = OTHERS[family]
    described = FAMILIES[family]
    config = {**described.configs[model]["transformer"], **layers}
    kind = getattr(diffusers, described.transformer)
    source = random_component(kind, config, dtype=torch.float16, seed=0).eval().requires_grad_(False)
    contract = described.contract(config, variant=Variant.EMAG_Q, blocks=(1,), precision="float16")
    return fork(source, contract)


def small_fork(
    variant: Variant, *, heads: int = 2, blocks: tuple[int, ...] = (1,), masked: bool = False
) -> Forked:
    """A half-precision fork with one block before the candidates and one behind them."""
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=blocks[-1] + 2,
        attention_head_dim=64,  # as in every SD3; fused kernels exist for few sizes
        num_attention_heads=heads,
        joint_attention_dim=64,
        caption_projection_dim=64 * heads,
        pooled_projection_dim=32,
        pos_embed_max_size=64,
    )
    model = model.half().eval().requires_grad_(False)
    contract = FAMILIES["sd3"].contract(model.config, variant=variant, blocks=blocks, precision="float16")
    forked = fork(model, contract)
    return masked_fork(forked) if masked else forked


def export(forked: Forked, path: Path) -> None:
    """Write its graph."""
    path.parent.mkdir(parents=True, exist_ok=True)
    spec = forked.contract.graph
    export_graph(forked, spec, random_inputs(spec, _EXAMPLE), path)


def scratch(path: Path, contract: DenoiserContract, side: int) -> int:
    """Bytes that the builder says an engine needs beside weights, inputs and outputs.

    Args:
        path: The graph.
        contract: Its contract.
        side: Image tokens along height and width; rows ``[u, c, p]``, one tracked.
    """
    sizes = {"trunk_rows": 2, "rows": 3, "tracked": 1, "h": side, "w": side, "text": TEXT}
    profile = {name: SizeRange(min=size, opt=size, max=size) for name, size in sizes.items()}
    options = EngineOptions(targets=("sm89",))
    plan = build_plan(path, contract.graph, (profile,), flavour_of("tensorrt-rtx"), options)
    return plan.memory["scratch"]


def one_map(heads: int, side: int) -> int:
    """Bytes of the attention map of one row, all heads, half precision."""
    return heads * side**2 * (side**2 + TEXT) * 2


def _cases() -> Iterator[tuple[dict[str, Any], Forked]]:
    for variant, heads, blocks, masked in _CASES:
        named = _named(variant, heads, blocks, masked)
        yield named, small_fork(variant, heads=heads, blocks=blocks, masked=masked)
    for family in OTHERS:
        yield _of_family(family), family_fork(family)


def main() -> None:
    """Build every case and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS)
    output: Path = parser.parse_args().output
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (named, forked) in enumerate(_cases()):
            path = Path(folder) / f"{number}" / "m.onnx"
            export(forked, path)
            for side in _SIDES:
                found = scratch(path, forked.contract, side)
                maps = found / one_map(forked.contract.heads, side)
                rows.append({**named, "tokens": side**2, "bytes": found, "maps": round(maps, 2)})
                Console().print(rows[-1])
    write_results(output, command="python -m benchmarks.fusion", axes=axes(), target="sm89", cases=rows)


if __name__ == "__main__":
    main()
