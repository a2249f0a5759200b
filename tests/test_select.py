"""Choosing blocks to perturb."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emag_export.errors import InputError
from emag_export.runtime.sampling.select import always, lagged_argmax, scheduled


@given(st.lists(st.lists(st.floats(0, 9, width=32), min_size=3, max_size=3), min_size=1, max_size=5))
def test_lagged_argmax_takes_the_largest_of_each_image(rows: list[list[float]]) -> None:
    mask = lagged_argmax(3, torch.tensor(rows))
    assert mask.sum(dim=1).tolist() == [1.0] * len(rows)
    assert [row.index(1.0) for row in mask.tolist()] == [row.index(max(row)) for row in rows]


def test_always_gives_every_image_the_named_blocks() -> None:
    mask = always([8, 6], (6, 7, 8))(0, torch.zeros(2, 3))
    assert mask.tolist() == [[1.0, 0.0, 1.0]] * 2


def test_always_refuses_a_block_that_is_no_candidate() -> None:
    with pytest.raises(InputError, match="block 9 is no candidate of this bundle, which has 6, 7, 8"):
        always([6, 9], (6, 7, 8))


def test_scheduled_replays_its_row() -> None:
    masks = torch.eye(3)
    assert scheduled(masks)(1, torch.zeros(2, 3)).tolist() == [[0.0, 1.0, 0.0]] * 2
