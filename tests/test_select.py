"""Choosing blocks to perturb."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emag_export.errors import InputError
from emag_export.runtime.sampling.select import (
    always,
    at_random,
    block_mask,
    by_delta,
    lagged_argmax,
    scheduled,
)

DELTA = st.lists(st.lists(st.floats(0, 9, width=32), min_size=3, max_size=3), min_size=1, max_size=5)

RECORDED = [(1.0, 1.0, 0.0, 0.0), (1.0, 0.0, 1.0, 0.0), (0.0, 0.0, 1.0, 1.0), (1.0, 0.0, 0.0, 1.0)]


@given(DELTA)
def test_lagged_argmax_takes_the_largest_of_each_image(rows: list[list[float]]) -> None:
    mask = lagged_argmax(torch.tensor(rows))
    assert mask.sum(dim=1).tolist() == [1.0] * len(rows)
    assert [row.index(1.0) for row in mask.tolist()] == [row.index(max(row)) for row in rows]


def test_by_delta_leaves_every_step_to_delta() -> None:
    assert by_delta(0) is by_delta(27) is None


@pytest.mark.parametrize("index", [0, 27])
def test_always_names_the_same_blocks_in_every_step(index: int) -> None:
    assert always([8, 6], (6, 7, 8))(index) == (1.0, 0.0, 1.0)


def test_always_refuses_a_block_that_is_no_candidate() -> None:
    with pytest.raises(InputError, match="block 9 is no candidate, which are 6, 7, 8"):
        always([6, 9], (6, 7, 8))


def test_blocks_at_random_are_as_many_as_asked_for_and_those_of_earlier_versions() -> None:
    """Recorded: who gives the seed of a picture again gets the same blocks, whatever the version."""
    choose = at_random(2, (4, 5, 6, 7), 4)
    assert [choose(index) for index in range(4)] == RECORDED
    for count in (1, 4):
        assert {sum(at_random(count, (4, 5, 6, 7), 8)(index) or ()) for index in range(8)} == {count}
    for count in (0, 5):
        with pytest.raises(InputError, match=f"`random_blocks` is {count}; there are 4 .* give 1 to 4"):
            at_random(count, (4, 5, 6, 7), 8)


def test_scheduled_replays_its_row() -> None:
    choose = scheduled(torch.eye(3).tolist())
    assert [choose(index) for index in range(3)] == [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)]


@given(DELTA, st.floats(0, 1, width=32))
def test_a_mask_is_the_choice_or_the_largest_at_its_strength(
    rows: list[list[float]], strength: float
) -> None:
    delta = torch.tensor(rows)
    assert torch.equal(block_mask(None, delta, strength), lagged_argmax(delta) * strength)
    given_before = block_mask((1.0, 0.0, 1.0), delta, strength)
    assert given_before.tolist() == [[strength, 0.0, strength]] * len(rows)
