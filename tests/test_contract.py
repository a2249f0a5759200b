"""The contract of a graph: what it says, what it refuses, how it is stored."""

import json
from dataclasses import asdict, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emag_export.contract import CONTRACT_VERSION, STATE_PAIRS, DenoiserContract, GraphSpec, Renorm, Variant
from emag_export.errors import BundleError, ContractError, InputError
from emag_export.shapes import evaluate

SD3 = DenoiserContract(
    variant=Variant.EMAG_Q,
    blocks=(6, 7, 8),
    num_blocks=24,
    heads=24,
    head_dim=64,
    in_channels=16,
    out_channels=16,
    patch_size=2,
    max_grid=192,
    text_dim=4096,
    pooled_dim=2048,
)
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


@given(SETTINGS)
def test_json_brings_a_contract_back(settings: dict[str, Any]) -> None:
    contract = replace(SD3, **settings)
    assert DenoiserContract.from_json(json.loads(json.dumps(contract.to_json()))) == contract


@given(SETTINGS)
def test_json_brings_a_graph_back(settings: dict[str, Any]) -> None:
    contract = replace(SD3, **settings)
    assert GraphSpec.from_json(json.loads(json.dumps(asdict(contract.graph)))) == contract.graph


@given(SETTINGS, st.fixed_dictionaries({name: st.integers(1, 40) for name in SIZES}))
def test_binding_finds_the_sizes_again(settings: dict[str, Any], sizes: dict[str, int]) -> None:
    contract = replace(SD3, **settings)
    shapes = {tensor.name: evaluate(tensor.dims, sizes) for tensor in contract.graph.inputs}
    assert contract.graph.bind(shapes) == sizes
    outputs = contract.graph.output_shapes(sizes)
    assert outputs["noise_pred"] == (sizes["rows"], 16, 2 * sizes["h"], 2 * sizes["w"])
    for fed, returned in STATE_PAIRS.items():
        assert outputs[returned] == shapes[fed]


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
        ((), "no candidate block was given; .*--emag-layers"),
        ((7, 6), "ascending"),
        ((6, 6), "without repetition"),
        ((-1, 2), "blocks 0 to 23"),
        ((23, 24), "blocks 0 to 23"),
    ],
)
def test_bad_candidate_blocks_are_refused(blocks: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(SD3, blocks=blocks)


def test_a_newer_contract_is_refused_with_a_remedy() -> None:
    with pytest.raises(BundleError, match=f"contract version {CONTRACT_VERSION + 1}, .* upgrade emag-export"):
        DenoiserContract.from_json({**SD3.to_json(), "version": CONTRACT_VERSION + 1})


def _without(field: str) -> dict[str, Any]:
    return {name: value for name, value in SD3.to_json().items() if name != field}


@pytest.mark.parametrize(
    "data",
    [
        {},
        {**SD3.to_json(), "version": "1"},
        {**SD3.to_json(), "variant": "emag-z"},
        {**SD3.to_json(), "blocks": None},
        {**SD3.to_json(), "unheard_of": 1},
        _without("heads"),
        _without("variant"),
    ],
)
def test_a_damaged_contract_is_a_bundle_error(data: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match="bundle"):
        DenoiserContract.from_json(data)


def test_a_stored_contract_with_bad_blocks_is_refused() -> None:
    with pytest.raises((BundleError, InputError)):
        DenoiserContract.from_json({**SD3.to_json(), "blocks": [99]})
