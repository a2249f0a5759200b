"""The table of call times: how it is made, kept and read, and how many images a call it advises."""

import shutil
from pathlib import Path

import pytest

from emag_export.bundle import Bundle
from emag_export.errors import BundleError, InputError
from emag_export.runtime.batching.call_times import (
    CallTime,
    CallTimes,
    measure_call_times,
    read_call_times,
    save_call_times,
    stored_call_times,
)
from emag_export.runtime.batching.options import BatchingOptions, room_for, size_room
from emag_export.runtime.pipeline import Pipeline
from emag_export.runtime.request import default_request, plan_request
from emag_export.runtime.sampling.plan import Phase, Plan
from tests.bundles import opener


def table(plain: dict[int, float], guide: dict[int, float]) -> CallTimes:
    rows = [
        CallTime(images=images, phase=phase, seconds=seconds)
        for phase, column in ((Phase.PLAIN, plain), (Phase.GUIDE, guide))
        for images, seconds in column.items()
    ]
    return CallTimes(bundle="k", engine="e", machine="m", threads=0, height=64, width=64, times=tuple(rows))


@pytest.fixture
def plan(tiny_bundle: Path) -> Plan:
    """28 steps, of which 23 have a perturbed row."""
    bundle = Bundle(tiny_bundle)
    return plan_request(bundle, default_request(bundle, "a red circle"))


def test_times_between_and_beyond_the_measured_ones() -> None:
    times = table({1: 1.0, 2: 1.5, 4: 2.5}, {1: 2.0, 2: 3.0, 4: 5.0})
    assert times.seconds(2) == 1.5
    assert times.seconds(3) == pytest.approx(2.0)
    assert times.seconds(6) == pytest.approx(3.5), "along the last slope"
    assert times.seconds(2, guided=1) == pytest.approx(2.25), "half of the rows are perturbed"
    assert table({1: 1.0}, {1: 2.0}).seconds(3) == pytest.approx(3.0), "one row: in proportion"


def test_a_run_takes_the_time_of_its_phases(plan: Plan) -> None:
    phases = [step.phase for step in plan.steps]
    guided = phases.count(Phase.GUIDE)
    times = table({1: 1.0}, {1: 2.0})
    assert times.run_seconds(plan) == pytest.approx(28 + guided) and 0 < guided < 28


@pytest.mark.parametrize(
    ("column", "most"),
    [
        ({1: 1.0, 2: 2.0, 4: 4.0}, 1),
        ({1: 1.0, 2: 1.2, 4: 2.4, 8: 4.8}, 2),
        ({1: 1.0, 2: 1.2, 4: 1.6, 8: 2.4}, 8),
        ({1: 1.0, 2: 1.99, 4: 3.9, 8: 7.6}, 8),
        ({1: 1.0, 2: 1.2, 4: 3.0}, 2),
    ],
    ids=["never", "two", "always", "slowly", "then worse"],
)
def test_images_share_a_call_only_where_it_pays(column: dict[int, float], most: int, plan: Plan) -> None:
    assert table(column, column).most_that_pay(plan) == most


def test_a_table_is_measured_kept_and_found_again(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle(shutil.copytree(tiny_bundle, tmp_path / "b"))
    with Pipeline(bundle, opener(threads=1)) as pipeline:
        prepared = pipeline.prepare([default_request(bundle, "a red circle")])
        found = measure_call_times(bundle, pipeline.denoiser, prepared, most=2, threads=1)
        assert {row.images for row in found.times} == {1, 2}
        assert found.seconds(2) < 3 * found.seconds(1) and found.seconds(1, 1) > 0.5 * found.seconds(1)
        path, nothing = stored_call_times(bundle, pipeline.denoiser, (64, 64), 1)
        assert nothing is None
        assert save_call_times(path, found)
        assert stored_call_times(bundle, pipeline.denoiser, (64, 64), 1) == (path, found)
        for size, threads in (((128, 64), 1), ((64, 64), 2)):
            other, nothing = stored_call_times(bundle, pipeline.denoiser, size, threads)
            assert other != path and nothing is None
        sized = size_room(pipeline, BatchingOptions(threads=1))
        assert sized.kept and sized.call_times == found, "it is not measured again"
        assert sized.room.live >= 4 >= sized.room.per_call
        asked = size_room(pipeline, BatchingOptions(threads=1, images_per_call=3, live_images=5))
        assert (asked.room.per_call, asked.room.live) == (3, 5)
        path.write_text("{")
        assert stored_call_times(bundle, pipeline.denoiser, (64, 64), 1)[1] is None
    bundle.check()


def test_as_many_images_are_live_as_their_averages_allow(plan: Plan) -> None:
    """None at all for negatives that keep nothing."""
    times = table({1: 1.0, 2: 2.0}, {1: 1.0, 2: 2.0})
    live = [
        room_for(times, plan, BatchingOptions(), state_bytes=size).live for size in (0, 1, 1 << 30, 1 << 31)
    ]
    assert live == [4, 4, 3, 2]


def test_a_damaged_table_is_named(tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    with pytest.raises(InputError, match="cannot be read"):
        read_call_times(path)
    path.write_text('{"format_version": 1}')
    with pytest.raises(BundleError, match="bundle is missing"):
        read_call_times(path)
    assert save_call_times(path, table({1: 1.0}, {1: 1.0}))
    assert read_call_times(path).seconds(1) == 1.0
    assert not save_call_times(path / "below" / "a.json", table({1: 1.0}, {1: 1.0})), "no folder to write to"


def test_a_table_needs_the_time_of_one_image() -> None:
    with pytest.raises(InputError, match="time of one guide image"):
        table({1: 1.0}, {2: 2.0})
    with pytest.raises(InputError, match="without images or seconds"):
        table({1: 0.0}, {1: 1.0})
