"""Named dimensions: evaluation, and finding sizes from tensors."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emag_export.errors import ContractError
from emag_export.shapes import Dim, evaluate, product, solve, symbols, without

DIMS: dict[str, tuple[Dim, ...]] = {
    "latents": ("rows", 4, "2*h", "2*w"),
    "tokens": ("rows", "text", 16),
    "map": ("rows", "h*w", "h*w+text"),
}
SIZES = st.fixed_dictionaries({name: st.integers(1, 50) for name in ("rows", "h", "w", "text")})


@given(SIZES)
def test_evaluate_is_ordinary_arithmetic(sizes: dict[str, int]) -> None:
    h, w, text = sizes["h"], sizes["w"], sizes["text"]
    assert evaluate([7, "h", "2*h", "h*w", "h*w+text", "3*h*w+2*text"], sizes) == (
        7,
        h,
        2 * h,
        h * w,
        h * w + text,
        3 * h * w + 2 * text,
    )


@given(SIZES)
def test_solve_inverts_evaluate(sizes: dict[str, int]) -> None:
    shapes = {name: evaluate(dims, sizes) for name, dims in DIMS.items()}
    assert solve(DIMS, shapes) == sizes


@given(SIZES, st.sampled_from(["latents", "tokens", "map"]), st.integers(0, 2), st.integers(1, 3))
def test_a_single_wrong_axis_is_refused(sizes: dict[str, int], tensor: str, axis: int, by: int) -> None:
    # Changing one latent side by a whole patch keeps the tensor itself valid; the map must then disagree.
    shapes = {name: evaluate(dims, sizes) for name, dims in DIMS.items()}
    wrong = list(shapes[tensor])
    wrong[axis] += by
    if tensor == "tokens" and axis == 1:
        shapes.pop("map")  # the text length alone is free to change: see the map
        assert solve({"tokens": DIMS["tokens"]}, {"tokens": tuple(wrong)})["text"] == sizes["text"] + by
        return
    with pytest.raises(ContractError, match=r"size \d+ along axis \d"):
        solve(DIMS, {**shapes, tensor: tuple(wrong)})


def test_symbols_keep_their_order() -> None:
    assert symbols(["rows", 4, "2*h", "h*w+text"]) == ("rows", "h", "w", "text")


@given(SIZES, st.lists(st.one_of(st.integers(1, 9), st.sampled_from(["h", "w", "text"])), max_size=4))
def test_product_is_how_many_elements_the_axes_hold(sizes: dict[str, int], dims: list[Dim]) -> None:
    assert evaluate([product(dims)], sizes) == (math.prod(evaluate(dims, sizes)),)


@pytest.mark.parametrize(
    ("dims", "wanted"),
    [(("h", "w"), "h*w"), ((16, 16), 256), ((2, "h", 3), "6*h"), ((1, "h"), "h"), (("h",), "h"), ((), 1)],
)
def test_product_is_written_as_contracts_write_it(dims: tuple[Dim, ...], wanted: Dim) -> None:
    assert product(dims) == wanted


@given(SIZES, st.lists(st.sampled_from(["h*w", "2*h", "text", "3"]), min_size=2, max_size=4, unique=True))
def test_without_takes_one_summand_away(sizes: dict[str, int], summands: list[str]) -> None:
    for summand in summands:
        rest = without("+".join(summands), summand)
        assert rest is not None
        whole, part = evaluate(["+".join(summands), summand], sizes)
        assert evaluate([rest], sizes) == (whole - part,)


def test_without_leaves_nothing_or_everything() -> None:
    """How an attention without text is told from one with text: what is left of its keys."""
    assert without("h*w+text", "h*w") == "text"
    assert without("h*w", "h*w") is None
    assert without(256, 256) is None
    assert without("h*w+text", "h") == "h*w+text", "a factor is no summand"


def test_errors_say_what_was_got_wanted_and_why() -> None:
    dims: dict[str, tuple[Dim, ...]] = {"a": ("n", "2*h"), "b": ("n", 3)}
    with pytest.raises(ContractError, match=r"a has shape \[1\], expected 2 dimensions \[n, 2\*h\]"):
        solve(dims, {"a": (1,), "b": (1, 3)})
    with pytest.raises(ContractError, match=r"a has size 5 along axis 1; it must be a multiple of 2"):
        solve(dims, {"a": (1, 5), "b": (1, 3)})
    with pytest.raises(ContractError, match=r"b has size 2 along axis 0, expected n = 1 \(n=1 from a\)"):
        solve(dims, {"a": (1, 4), "b": (2, 3)})
    with pytest.raises(ContractError, match=r"b has size 4 along axis 1, expected 3 as exported"):
        solve(dims, {"a": (1, 4), "b": (1, 4)})
