"""The contract of a graph: what it says, what it refuses, how it is stored."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emag_export.contract import CONTRACT_VERSION, STATE_PAIRS, DenoiserContract, GraphSpec, TensorSpec
from emag_export.errors import BundleError, ContractError, InputError
from emag_export.kinds import Renorm, Variant, member
from emag_export.records import parse_record
from emag_export.shapes import Dim, evaluate

SD3 = DenoiserContract(
    family="sd3",
    variant=Variant.EMAG_Q,
    blocks=(6, 7, 8),
    num_blocks=24,
    heads=24,
    head_dim=64,
    latents=(16, "2*h", "2*w"),
    out_channels=16,
    grid=("h", "w"),
    keys="h*w+text",
    conditioning=(
        TensorSpec(name="encoder_hidden_states", dtype="float32", dims=("trunk_rows", "text", 4096)),
        TensorSpec(name="pooled_projections", dtype="float32", dims=("trunk_rows", 2048)),
    ),
    limits={"h": 192, "w": 192},
)
"""SD3-medium."""
FIXED = replace(SD3, latents=(4, 32, 32), grid=(16, 16), keys=256, conditioning=(), limits={})
"""A model without text whose pictures have one size, as DiT has."""
SIZES = {"trunk_rows": 2, "rows": 3, "tracked": 1, "text": 333, "h": 64, "w": 64}

SETTINGS = st.fixed_dictionaries(
    {
        "variant": st.sampled_from(Variant),
        "renorm": st.sampled_from(Renorm),
        "precision": st.sampled_from(["float32", "float16"]),
        "blocks": st.sets(st.integers(0, 23), min_size=1).map(lambda blocks: tuple(sorted(blocks))),
    }
)


# arXiv:2512.17303 for SD3-medium at 1024 x 1024 in float16: 12.6 MB, 870 MB and 805 MB per image and block.
@pytest.mark.parametrize(
    ("variant", "megabytes"), [(Variant.EMAG_Q, 12.6), (Variant.EMAG, 870), (Variant.EMAG_I, 805)]
)
def test_the_state_is_as_large_as_the_paper_says(variant: Variant, megabytes: float) -> None:
    contract = replace(SD3, variant=variant, state_dtype="float16", blocks=(6,))
    (state,) = (tensor for tensor in contract.graph.inputs if tensor.name == "ema_state")
    assert state.nbytes(SIZES) / 1e6 == pytest.approx(megabytes, rel=5e-3)


def test_the_graph_of_sd3_is_spelt_as_always() -> None:
    """Names and shapes that engines and other programs rely on."""
    shapes = {tensor.name: tensor.dims for tensor in (*SD3.graph.inputs, *SD3.graph.outputs)}
    assert shapes == {
        "hidden_states": ("trunk_rows", 16, "2*h", "2*w"),
        "timestep": ("trunk_rows",),
        "encoder_hidden_states": ("trunk_rows", "text", 4096),
        "pooled_projections": ("trunk_rows", 2048),
        "branch_rows": ("rows",),
        "ema_state": ("tracked", 3, 24, "h", "w", 64),
        "ema_step": ("tracked",),
        "layer_mask": ("tracked", 3),
        "noise_pred": ("rows", 16, "2*h", "2*w"),
        "ema_state_out": ("tracked", 3, 24, "h", "w", 64),
        "layer_delta": ("tracked", 3),
    }


@pytest.mark.parametrize(
    ("variant", "of_sd3", "of_fixed"),
    [
        (Variant.EMAG_Q, (24, "h", "w", 64), (24, 16, 16, 64)),
        (Variant.EMAG, (24, "h*w", "h*w+text"), (24, 256, 256)),
        (Variant.EMAG_I, (24, "h*w", "h*w"), None),
        (Variant.EMAG_T, (24, "h*w", "text"), None),
    ],
)
def test_what_is_averaged_follows_from_variant_and_attention(
    variant: Variant, of_sd3: tuple[Dim, ...], of_fixed: tuple[Dim, ...] | None
) -> None:
    assert replace(SD3, variant=variant).state_dims == of_sd3
    if of_fixed is None:
        with pytest.raises(
            InputError, match="this model's attention sees no text; choose the `variant` emag or"
        ):
            replace(FIXED, variant=variant)
        return
    fixed = replace(FIXED, variant=variant)
    assert fixed.state_dims == of_fixed
    assert fixed.tokens == 256
    assert fixed.graph.symbols == ("trunk_rows", "rows", "tracked"), "nothing but rows is dynamic"


def parsed(kind: Any, data: dict[str, Any]) -> Any:
    return parse_record(kind, json.loads(json.dumps(data)), name="bundle.json", remedy="rebuild the bundle")


@given(SETTINGS)
def test_json_brings_a_contract_back(settings: dict[str, Any]) -> None:
    contract = replace(SD3, **settings)
    assert parsed(DenoiserContract, asdict(contract)) == contract


@given(SETTINGS)
def test_json_brings_a_graph_back(settings: dict[str, Any]) -> None:
    contract = replace(SD3, **settings)
    assert parsed(GraphSpec, asdict(contract.graph)) == contract.graph


@given(SETTINGS, st.fixed_dictionaries({name: st.integers(1, 40) for name in SIZES}))
def test_binding_finds_the_sizes_again(settings: dict[str, Any], sizes: dict[str, int]) -> None:
    contract = replace(SD3, **settings)
    shapes = {tensor.name: evaluate(tensor.dims, sizes) for tensor in contract.graph.inputs}
    assert contract.graph.bind(shapes) == sizes
    outputs = contract.graph.output_shapes(sizes)
    assert outputs["noise_pred"] == (sizes["rows"], 16, 2 * sizes["h"], 2 * sizes["w"])
    averages = contract.kind.averages is not None
    for fed, returned in STATE_PAIRS.items():
        assert (fed in shapes) == (returned in outputs) == averages
        assert outputs.get(returned) == shapes.get(fed)


def test_binding_names_what_is_missing_or_unknown() -> None:
    shapes = {tensor.name: evaluate(tensor.dims, SIZES) for tensor in SD3.graph.inputs}
    without = {name: shape for name, shape in shapes.items() if name != "ema_step"}
    with pytest.raises(ContractError, match="transformer was not fed ema_step; it takes hidden_states, "):
        SD3.graph.bind(without)
    with pytest.raises(ContractError, match="transformer has no input guidance; it takes hidden_states, "):
        SD3.graph.bind({**shapes, "guidance": (1,)})


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ((), "no candidate block was given; .*`emag_candidates`"),
        ((7, 6), "ascending"),
        ((6, 6), "without repetition"),
        ((-1, 2), "blocks 0 to 23"),
        ((23, 24), "blocks 0 to 23"),
    ],
)
def test_bad_candidate_blocks_are_refused(blocks: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(SD3, blocks=blocks)


@pytest.mark.parametrize("version", [0, -1, CONTRACT_VERSION - 1, CONTRACT_VERSION + 1])
def test_another_contract_version_is_refused_with_a_remedy(version: int) -> None:
    with pytest.raises(BundleError, match=f"contract version is {version}, .* upgrade emag-export"):
        parsed(DenoiserContract, {**asdict(SD3), "version": version})


def _without(field: str) -> dict[str, Any]:
    return {name: value for name, value in asdict(SD3).items() if name != field}


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({}, "family is missing"),
        ({**asdict(SD3), "version": "1"}, "version: input should be a valid integer"),
        ({**asdict(SD3), "variant": "emag-z"}, "variant: .*'emag-q', 'emag', .*got \"emag-z\""),
        ({**asdict(SD3), "blocks": None}, "blocks: "),
        ({**asdict(SD3), "blocks": [99]}, r"candidate blocks \[99\] lie outside"),
        ({**asdict(SD3), "blocks": [2.5]}, r"blocks\.0: "),
        ({**asdict(SD3), "heads": 0}, "heads is 0; it must be at least 1"),
        ({**asdict(SD3), "latents": [16, "2*h"]}, "latents are .*; wanted are channels, then two or more"),
        ({**asdict(SD3), "latents": ["c", "h", "w"]}, "wanted are channels, then two or more sides"),
        ({**asdict(SD3), "out_channels": 8}, "8 channels are predicted of latents that have 16"),
        ({**asdict(SD3), "prediction": "sample"}, "prediction is 'sample'; it must be velocity or epsilon"),
        ({**asdict(SD3), "keys": "h*w-1"}, "'h.w-1' is no dimension"),
        ({**asdict(SD3), "heads": True}, "heads: "),
        ({**asdict(SD3), "precision": "float8"}, "precision is 'float8'"),
        ({**asdict(SD3), "unheard_of": 1}, "unheard_of is no field"),
        (_without("heads"), "heads is missing"),
    ],
)
def test_a_damaged_contract_is_a_bundle_error(data: dict[str, Any], named: str) -> None:
    with pytest.raises(BundleError, match=f"bundle.json cannot be read: .*{named}.*rebuild"):
        parsed(DenoiserContract, data)


@pytest.mark.parametrize("dims", [["rows", "2*"], ["rows", ""], ["a-b"], ["h w"]])
def test_a_damaged_dimension_is_named(dims: list[str]) -> None:
    spec = {"name": "x", "inputs": [{"name": "t", "dtype": "int64", "dims": dims}], "outputs": []}
    with pytest.raises(BundleError, match=r"t: .* is no dimension"):
        parsed(GraphSpec, spec)


def test_enumerations_are_made_of_their_values() -> None:
    """In a fresh interpreter: a caller without a type checker may well give a string."""
    code = (
        "from emag_export.kinds import *\n"
        "from emag_export.options import BuildOptions\n"
        "options = BuildOptions(variant='emag-q', renorm='none')\n"
        "assert options.variant is Variant.EMAG_Q and options.renorm is Renorm.NONE\n"
        "assert options == BuildOptions(renorm=Renorm.NONE)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(InputError, match="there is no variant 'emag-z'; choose emag-q, emag, emag-i, emag-t"):
        member(Variant, "emag-z", "variant")
