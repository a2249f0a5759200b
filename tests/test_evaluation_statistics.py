"""Intervals and tests against closed forms, other libraries, and simulations whose truth is known."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emag_export.evaluation.statistics import bootstrap_interval, holm, sign_flip_p


def test_an_interval_is_the_normal_one_where_there_are_many_prompts() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 2000)
    found = bootstrap_interval(values)
    half = 1.96 * values.std() / np.sqrt(len(values))
    # Ends of 10000 resamples scatter by a few percent of the width.
    assert found.mean == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.01)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(120):
        found = bootstrap_interval(rng.exponential(1.0, 40))
        inside += found.low <= 1.0 <= found.high
    # Of skewed values, percentile intervals are short: 0.92 is known for exponentials of 40.
    assert 0.85 <= inside / 120 <= 0.99


def test_the_same_values_have_the_same_interval() -> None:
    assert bootstrap_interval([1.0, 2.0, 4.0]) == bootstrap_interval([1.0, 2.0, 4.0])
    single = bootstrap_interval([2.5])
    assert (single.low, single.mean, single.high) == (2.5, 2.5, 2.5)


def test_the_exact_test_counts_signs() -> None:
    assert sign_flip_p([1.0, 1.0, 1.0]) == pytest.approx(2 / 8)
    assert sign_flip_p([3.0, 2.0, -1.0]) == 0.5, "sums are ±6, ±4, ±2 and 0 twice; four reach 4"
    assert sign_flip_p([1.0] * 10) == pytest.approx(2 / 1024)
    assert sign_flip_p([0.0, 0.0]) == sign_flip_p([]) == 1.0
    assert sign_flip_p([0.1, 0.2, 0.3, 0.0]) == pytest.approx(0.25), "equal prompts say nothing"


def test_random_signs_agree_with_the_normal_approximation() -> None:
    values = np.random.default_rng(2).normal(0.25, 1.0, 100)
    z = values.sum() / np.sqrt((values**2).sum())
    from math import erfc

    # 20000 draws: a standard error of 0.0012 at p = 0.03.
    assert sign_flip_p(values) == pytest.approx(erfc(abs(z) / np.sqrt(2)), abs=0.006)


def test_where_nothing_differs_p_is_below_a_tenth_once_in_ten() -> None:
    rng = np.random.default_rng(3)
    found = [sign_flip_p(rng.standard_t(3, 12)) for _ in range(300)]
    assert 0.05 < np.mean(np.array(found) < 0.1) < 0.16


def test_holm_is_the_textbooks() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_lies_between_the_values_and_bonferroni_and_keeps_their_order(p: list[float]) -> None:
    adjusted = holm(p)
    for before, after in zip(p, adjusted, strict=True):
        assert before <= after <= min(1.0, len(p) * before) or after == pytest.approx(before)
    ranked = [value for _, value in sorted(zip(p, adjusted, strict=True))]
    assert ranked == sorted(ranked)
