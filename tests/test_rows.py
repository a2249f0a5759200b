"""Packing rows: every image finds its own predictions, and the tracked rows come last."""

from hypothesis import given
from hypothesis import strategies as st

from emag_export.runtime.sampling.plan import Phase
from emag_export.runtime.sampling.rows import lay_out_rows

PHASES = st.lists(st.sampled_from(Phase), min_size=1, max_size=9)


@given(PHASES, st.booleans())
def test_every_row_is_of_its_image_and_half(phases: list[Phase], uncond: bool) -> None:
    layout = lay_out_rows(phases, uncond)
    images = len(phases)
    trunk = [("u", i) for i in range(images)] * uncond + [("c", i) for i in range(images)]
    assert layout.trunk_rows == len(trunk)
    branch = [trunk[row] for row in layout.branch_rows]
    assert [branch[row] for row in layout.cond] == [("c", i) for i in range(images)]
    assert [branch[row] for row in layout.perturbed] == [("c", i) for i in range(images)]
    if uncond:
        assert layout.uncond is not None
        assert [branch[row] for row in layout.uncond] == [("u", i) for i in range(images)]
    else:
        assert layout.uncond is None


@given(PHASES, st.booleans())
def test_tracked_rows_are_the_last_in_the_order_of_images(phases: list[Phase], uncond: bool) -> None:
    layout = lay_out_rows(phases, uncond)
    rows = len(layout.branch_rows)
    assert layout.perturbed == tuple(range(rows - len(phases), rows))


@given(PHASES, st.booleans())
def test_only_guided_images_pay_for_a_row_of_their_own(phases: list[Phase], uncond: bool) -> None:
    layout = lay_out_rows(phases, uncond)
    guided = [phase == Phase.GUIDE for phase in phases]
    assert [c != p for c, p in zip(layout.cond, layout.perturbed, strict=True)] == guided
    assert len(layout.branch_rows) == len(phases) * (1 + uncond) + sum(guided)
    used = {*layout.cond, *layout.perturbed, *(layout.uncond or ())}
    assert used == set(range(len(layout.branch_rows))), "a row that nobody reads was computed"


def test_the_canonical_call() -> None:
    layout = lay_out_rows([Phase.GUIDE, Phase.TRACK], True)
    # trunk u0 u1 c0 c1; branch u0 u1, then the conditional row that is no tracked one, then p0 and c1
    assert layout.branch_rows == (0, 1, 2, 2, 3)
