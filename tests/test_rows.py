"""Packing rows: every image finds its own predictions, and the tracked rows come last."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from emag_export.runtime.sampling.plan import Phase
from emag_export.runtime.sampling.rows import RowLayout, lay_out_rows, pick, place_rows

CPU = torch.device("cpu")
IMAGES = st.lists(st.tuples(st.sampled_from(Phase), st.booleans()), min_size=1, max_size=9)
"""Phase of every image, and whether it needs an unconditional row."""

Images = list[tuple[Phase, bool]]


def layout_of(images: Images) -> RowLayout:
    return lay_out_rows([phase for phase, _ in images], [uncond for _, uncond in images])


def trunk_of(images: Images) -> list[tuple[str, int]]:
    """What every trunk row is: half and image."""
    return [("u", i) for i, (_, uncond) in enumerate(images) if uncond] + [
        ("c", i) for i in range(len(images))
    ]


@given(IMAGES)
def test_every_row_is_of_its_image_and_half(images: Images) -> None:
    layout, trunk = layout_of(images), trunk_of(images)
    assert list(layout.trunk_images) == [image for _, image in trunk]
    branch = [trunk[row] for row in layout.branch_rows]
    conditional = [("c", i) for i in range(len(images))]
    assert [branch[row] for row in layout.cond] == conditional
    assert [branch[row] for row in layout.perturbed] == conditional
    if layout.uncond is None:
        assert not any(uncond for _, uncond in images)
    else:
        wanted = [("u" if uncond else "c", i) for i, (_, uncond) in enumerate(images)]
        assert [branch[row] for row in layout.uncond] == wanted


@given(IMAGES)
def test_without_an_unconditional_row_the_conditional_one_stands_in(images: Images) -> None:
    """Not the perturbed one: the image's guidance ignores it, but a prediction that is shown should be so."""
    layout = layout_of(images)
    for i, (_, uncond) in enumerate(images):
        if layout.uncond is not None:
            assert (layout.uncond[i] == layout.cond[i]) == (not uncond)


@given(IMAGES)
def test_tracked_rows_are_the_last_in_the_order_of_images(images: Images) -> None:
    layout = layout_of(images)
    rows = len(layout.branch_rows)
    assert layout.perturbed == tuple(range(rows - len(images), rows))


@given(IMAGES)
def test_only_images_that_need_them_pay_for_rows(images: Images) -> None:
    layout = layout_of(images)
    guided = [phase == Phase.GUIDE for phase, _ in images]
    unconditional = sum(uncond for _, uncond in images)
    assert [c != p for c, p in zip(layout.cond, layout.perturbed, strict=True)] == guided
    assert len(layout.trunk_images) == len(images) + unconditional
    assert len(layout.branch_rows) == len(layout.trunk_images) + sum(guided)
    used = {*layout.cond, *layout.perturbed, *(layout.uncond or ())}
    assert used == set(range(len(layout.branch_rows))), "a row that nobody reads was computed"


def test_the_canonical_call() -> None:
    layout = layout_of([(Phase.GUIDE, True), (Phase.TRACK, True)])
    # trunk u0 u1 c0 c1; branch u0 u1, then the conditional row that is no tracked one, then p0 and c1
    assert layout.trunk_images == (0, 1, 0, 1)
    assert layout.branch_rows == (0, 1, 2, 2, 3)


def test_a_call_in_which_some_images_have_no_unconditional_row() -> None:
    layout = layout_of([(Phase.GUIDE, False), (Phase.PLAIN, True), (Phase.GUIDE, True)])
    # trunk u1 u2 c0 c1 c2; branch u1 u2, c0 c2 for images that are perturbed, then p0 c1 p2
    assert layout.trunk_images == (1, 2, 0, 1, 2)
    assert layout.branch_rows == (0, 1, 2, 4, 2, 3, 4)
    assert layout.uncond == (2, 0, 1)
    assert layout.cond == (2, 5, 3)
    assert layout.perturbed == (4, 5, 6)


@given(IMAGES)
def test_placed_rows_split_predictions_as_the_layout_says(images: Images) -> None:
    """Whether rows are a slice or an index."""
    layout = layout_of(images)
    rows = place_rows(tuple(phase for phase, _ in images), tuple(uncond for _, uncond in images), CPU)
    assert rows.trunk_images.tolist() == list(layout.trunk_images)
    assert rows.branch_rows.tolist() == list(layout.branch_rows)
    number = torch.arange(len(layout.branch_rows), dtype=torch.float32).reshape(-1, 1, 1, 1)
    split = rows.split(number)
    assert split.cond.flatten().tolist() == list(layout.cond)
    assert split.perturbed.flatten().tolist() == list(layout.perturbed)
    nothing_perturbed = all(phase != Phase.GUIDE for phase, _ in images)
    assert (split.perturbed is split.cond) == nothing_perturbed, "the rows of both are computed once"
    assert (split.uncond is None) == (layout.uncond is None)
    if split.uncond is not None:
        assert split.uncond.flatten().tolist() == list(layout.uncond or ())
    with_row = [i for i, (_, uncond) in enumerate(images) if uncond]
    if rows.uncond_images is None:
        assert not with_row
    else:
        assert torch.arange(len(images))[rows.uncond_images].tolist() == with_row


def test_rows_behind_each_other_are_slices_and_cost_no_copy() -> None:
    rows = place_rows((Phase.PLAIN, Phase.TRACK, Phase.PLAIN), (True, True, True), CPU)
    assert (rows.uncond_images, rows.uncond) == (slice(0, 3), slice(0, 3))
    assert (rows.cond, rows.perturbed) == (slice(3, 6), slice(3, 6))
    prediction = torch.randn(6, 1, 1, 1)
    split = rows.split(prediction)
    assert split.cond.data_ptr() == split.perturbed.data_ptr() == prediction[3:].data_ptr()


@given(st.lists(st.integers(0, 5), max_size=9))
def test_picked_rows_are_a_copy_in_the_order_asked_for(images: list[int]) -> None:
    rows = torch.arange(12.0).reshape(6, 2)
    picked = pick(rows, images)
    assert picked.tolist() == [[2.0 * image, 2.0 * image + 1] for image in images]
    picked.fill_(-1)
    assert rows.flatten().tolist() == list(range(12))
