"""Windows, phases and what a run costs."""

import math
from collections import Counter
from dataclasses import asdict, replace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from emag_export.errors import InputError
from emag_export.kinds import Variant
from emag_export.runtime.guidance.rules import GUIDANCES, Guidance
from emag_export.runtime.keywords import amended
from emag_export.runtime.request import GenerationRequest
from emag_export.runtime.sampling.plan import (
    EmagWindows,
    Phase,
    Plan,
    Unit,
    cost_of,
    make_plan,
    window_index,
)
from emag_export.runtime.sampling.schedule import Schedule
from emag_export.runtime.sampling.select import scheduled
from tests.conftest import GOLDEN
from tests.golden.case import GoldenCase
from tests.test_contract import SD3


def schedule(steps: int) -> Schedule:
    sigmas = tuple(1 - index / steps for index in range(steps + 1))
    return Schedule.flow(sigmas, tuple(1000 * sigma for sigma in sigmas[:-1]))


def plan(
    steps: int = 28, guidance: str = "emag", windows: EmagWindows | None = None, **modifiers: Any
) -> Plan:
    return make_plan(SD3, schedule(steps), Guidance(name=guidance, **modifiers), windows)


RECORDINGS = ("query-canonical", "query-apg", "map-cads")
WINDOWS = st.builds(
    EmagWindows,
    beta=st.floats(0, 1),
    start=st.integers(-20, 300),
    delta=st.integers(0, 300),
    stop=st.integers(-20, 300),
)


def test_28_steps_accumulate_in_23_and_perturb_in_5_to_22() -> None:
    phases = [step.phase for step in plan().steps]
    assert [index for index, phase in enumerate(phases) if phase != Phase.PLAIN] == list(range(23))
    assert [index for index, phase in enumerate(phases) if phase == Phase.GUIDE] == list(range(5, 23))


def test_defaults_are_those_of_the_released_code() -> None:
    """As recorded from it: windows, scales, APG and CADS."""
    recorded = {name: GoldenCase.load(GOLDEN / f"{name}.npz").meta for name in RECORDINGS}
    plain = recorded["query-canonical"]
    windows = EmagWindows()
    assert {name: getattr(windows, name) for name in ("beta", "start", "delta", "stop")} == {
        name: plain[name] for name in ("beta", "start", "delta", "stop")
    }
    assert (windows.strength, windows.unit, windows.blur_sigma) == (1.0, Unit.RUN, None)
    guidance = Guidance()
    assert (guidance.name, guidance.scale, guidance.emag_scale) == (
        "emag",
        plain["guidance"],
        plain["emag_scale"],
    )
    assert asdict(guidance.apg) == recorded["query-apg"]["apg"]
    released = recorded["map-cads"]["cads"]
    assert asdict(guidance.cads) == {
        "tau1": released["tau1"],
        "tau2": released["tau2"],
        "noise_scale": released["s"],
        "mixing": released["psi"],
    }
    assert (guidance.modifiers, guidance.zero_init, guidance.interval) == ((), 1, (0.0, 1.0))


@given(WINDOWS, st.integers(1, 300))
def test_windows_are_those_of_the_specification(windows: EmagWindows, steps: int) -> None:
    # The specification's own sentence, step by step, with r counting down.
    def k(x: int) -> int:
        return min(max(round(x * (steps - 1) / 250), 0), steps - 1)

    for index, phase in enumerate(windows.phases(steps)):
        r = steps - 1 - index
        accumulate = k(windows.stop) <= r <= k(windows.start)
        perturb = k(windows.stop) <= r <= k(windows.start) - k(windows.delta)
        assert (phase != Phase.PLAIN) == accumulate
        assert (phase == Phase.GUIDE) == (perturb and accumulate)


@example(start=-3, delta=0, stop=-3, steps=4)
@given(
    start=st.integers(-3, 40), delta=st.integers(0, 40), stop=st.integers(-3, 40), steps=st.integers(1, 30)
)
def test_windows_in_steps_are_counted_from_the_end_of_the_run(
    start: int, delta: int, stop: int, steps: int
) -> None:
    """The same sentence, in which every position is a step already; what lies outside the run is its end."""
    phases = EmagWindows(start=start, delta=delta, stop=stop, unit=Unit.STEPS).phases(steps)
    first, wait, last = (min(max(position, 0), steps - 1) for position in (start, delta, stop))
    for index, phase in enumerate(phases):
        r = steps - 1 - index
        accumulate = last <= r <= first
        assert (phase != Phase.PLAIN) == accumulate
        assert (phase == Phase.GUIDE) == (accumulate and r <= first - wait)


def test_positions_outside_the_run_are_its_ends() -> None:
    assert [window_index(x, 28) for x in (-20, 0, 250, 300)] == [0, 0, 27, 27]


def test_halves_round_to_even_as_in_python() -> None:
    assert [window_index(x, 126) for x in (1, 3, 5)] == [0, 2, 2]  # 0.5, 1.5, 2.5 steps


@given(WINDOWS, st.integers(1, 120), st.sampled_from(sorted(GUIDANCES)))
def test_averages_start_once_and_hold_when_plain(windows: EmagWindows, steps: int, guidance: str) -> None:
    planned = plan(steps, guidance, windows).steps
    tracking = [step for step in planned if step.phase != Phase.PLAIN]
    assert [step.starts_average for step in tracking] == [True, *[False] * (len(tracking) - 1)][
        : len(tracking)
    ]
    assert [step.ema_step for step in tracking] == [1.0, *[1 - windows.beta] * (len(tracking) - 1)][
        : len(tracking)
    ]
    assert not any(step.starts_average or step.ema_step for step in planned if step.phase == Phase.PLAIN)
    if not GUIDANCES[guidance].perturbed:
        assert not tracking


@given(st.integers(1, 60))
def test_steps_walk_down_the_schedule(steps: int) -> None:
    planned = plan(steps).steps
    assert [step.index for step in planned] == list(range(steps))
    assert planned[-1].sigma + planned[-1].b == pytest.approx(0, abs=1e-6)  # float32 differences
    assert all(step.b < 0 for step in planned)
    assert all((step.a, step.p, step.q, step.log_variance) == (1, 1, -step.sigma, None) for step in planned)


@given(WINDOWS, st.integers(1, 60))
def test_blocks_are_left_to_delta_or_chosen_step_by_step(windows: EmagWindows, steps: int) -> None:
    rows = [(float(index), 0.0, 1.0) for index in range(steps)]
    chosen = make_plan(SD3, schedule(steps), Guidance(), windows, scheduled(rows)).steps
    assert [step.choice for step in chosen] == rows
    assert all(step.choice is None for step in plan(steps, "emag", windows).steps)
    for step in chosen:
        assert step.strength == (windows.strength if step.phase == Phase.GUIDE else 0)


@pytest.mark.parametrize("variant", [Variant.SKIP, Variant.IDENTITY, Variant.BLUR_QUERY])
def test_what_keeps_nothing_is_guided_without_preparation(variant: Variant) -> None:
    """All candidates in every step of the window, and nothing is tracked, started or moved."""
    sd3 = replace(SD3, variant=variant)
    windows = EmagWindows(beta=0.5, delta=50, strength=0.25, blur_sigma=1.5)
    planned = make_plan(sd3, schedule(28), Guidance(), windows).steps
    guided = [index for index, step in enumerate(planned) if step.phase == Phase.GUIDE]
    assert guided == list(range(5, 23))
    assert {step.phase for step in planned} == {Phase.PLAIN, Phase.GUIDE}
    assert {step.choice for step in planned} == {(1.0,) * len(SD3.blocks)}
    assert not any(step.ema_step or step.starts_average for step in planned)
    assert {step.strength for step in planned if step.phase == Phase.GUIDE} == {0.25}
    assert {step.blur_sigma for step in planned} == {1.5}


@pytest.mark.parametrize("sigma", [None, math.inf])
def test_without_a_sigma_a_blur_is_the_mean(sigma: float | None) -> None:
    windows = EmagWindows(blur_sigma=sigma)
    assert windows.blur_sigma is None, "JSON has no infinity"
    assert {step.blur_sigma for step in plan(windows=windows).steps} == {math.inf}
    assert EmagWindows(blur_sigma=0.0).blur_sigma == 0


def test_a_distilled_model_is_compared_with_one_row_a_step() -> None:
    """Counted by hand: 28 steps of 24 blocks for c, and 18 steps of 18 blocks for p."""
    cost = make_plan(SD3, schedule(28), Guidance(name="emag-only")).cost
    assert (cost.planned, cost.cfg, cost.own, cost.two_pass) == (996, 1344, 1344, 1344)
    phases = EmagWindows().phases(28)
    distilled = cost_of(SD3, phases, GUIDANCES["emag-only"], distilled=True)
    assert (distilled.planned, distilled.own) == (28 * 24 + 18 * 18, 28 * 24)
    assert distilled.relative_to_own == 996 / 672
    assert distilled.relative_to_cfg == 996 / 1344


def test_sd3_costs_1668_row_blocks_where_cfg_costs_1344() -> None:
    cost = plan().cost
    assert (cost.planned, cost.cfg, cost.two_pass) == (1668, 1344, 2688)
    assert cost.relative_to_cfg == pytest.approx(1.241, abs=5e-4)
    assert cost.relative_to_two_pass == 1668 / 2688
    assert plan(guidance="cfg").cost.planned == 1344


def test_with_an_interval_emag_costs_less_than_cfg() -> None:
    """Counted by hand: 28 steps of 24 blocks for c, 14 for u, and 18 steps of 18 blocks for p."""
    cost = plan(interval=(0.0, 0.5)).cost
    assert cost.planned == 28 * 24 + 14 * 24 + 18 * 18 == 1332
    assert (cost.cfg, cost.two_pass) == (1344, 2 * (28 + 14) * 24)
    assert cost.relative_to_cfg == pytest.approx(0.991, abs=5e-4)
    assert plan(interval=(0.2, 0.5)).cost.relative_to_cfg == pytest.approx(0.884, abs=5e-4)
    assert plan(guidance="cfg", interval=(0.0, 0.5)).cost.relative_to_cfg == 0.75


@given(
    st.integers(2, 60),
    st.sampled_from(sorted(GUIDANCES)),
    st.tuples(st.floats(0, 1), st.floats(0, 1)).map(lambda ends: (min(ends), max(ends))),
    st.integers(0, 1),
    st.booleans(),
)
def test_unconditional_rows_are_sent_where_they_are_used(
    steps: int, guidance: str, interval: tuple[float, float], zero_init: int, zero_star: bool
) -> None:
    made = plan(steps, guidance, interval=interval, zero_star=zero_star, zero_init=zero_init)
    low, high = interval
    for index, step in enumerate(made.steps):
        zeroed = zero_star and index < zero_init
        inside = low * (steps - 1) <= index + 1e-9 and index - 1e-9 <= high * (steps - 1)
        if abs(index - low * (steps - 1)) > 1e-9 and abs(index - high * (steps - 1)) > 1e-9:
            uncond = GUIDANCES[guidance].uncond and inside and not zeroed
            assert step.rows == (1 + uncond, 1 + uncond + (step.phase == Phase.GUIDE))
        assert step.rule.zeroed == zeroed


@pytest.mark.parametrize(
    ("modifiers", "message"),
    [
        ({"guided_channels": 17}, "`guided_channels` is 17; the model has 16: give fewer"),
        ({"zero_star": True, "zero_init": 28}, "`cfg_zero_init` is 28 of 28 steps, which would leave noise"),
    ],
)
def test_guidance_that_model_or_run_cannot_have_is_refused(modifiers: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan(**modifiers)


def test_a_noise_of_zero_is_refused() -> None:
    epsilon, guidance = replace(SD3, prediction="epsilon"), Guidance(zero_star=True)
    with pytest.raises(InputError, match=r"`cfg_zero_init` is 1; this model predicts epsilon, .*: give 0"):
        make_plan(epsilon, schedule(4), guidance)
    make_plan(epsilon, schedule(4), replace(guidance, zero_init=0))


def test_guidance_that_the_model_can_just_have_is_planned() -> None:
    assert plan(guided_channels=16).steps[0].rule.channels == 16
    assert plan(zero_star=True, zero_init=27).steps[26].rule.zeroed
    assert {step.rule.patch for step in plan(norm=True).steps} == {SD3.patch}
    assert {step.rule.patch for step in plan().steps} == {None}


def test_dit_costs_14816_row_blocks_where_cfg_costs_14000() -> None:
    dit = replace(SD3, num_blocks=28, blocks=(12, 13, 14))
    phases = [Phase.GUIDE] * 51 + [Phase.PLAIN] * 199
    cost = cost_of(dit, phases, GUIDANCES["emag"])
    assert (cost.planned, cost.cfg, cost.own) == (14816, 14000, 14000)
    assert cost.relative_to_cfg == pytest.approx(1.058, abs=5e-4)


@given(WINDOWS, st.integers(1, 60), st.sampled_from(sorted(GUIDANCES)))
def test_cost_counts_the_rows_of_every_step(windows: EmagWindows, steps: int, guidance: str) -> None:
    made = plan(steps, guidance, windows)
    counted = 0
    for step in made.steps:
        trunk, branch = step.rows
        counted += trunk * SD3.fork + branch * (SD3.num_blocks - SD3.fork)
    assert made.cost.planned == counted


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("beta", 1.5, "`emag_beta` is 1.5; it must lie between"),
        ("beta", float("nan"), "`emag_beta` is nan"),
        ("strength", -0.1, "`emag_strength` is -0.1"),
        ("delta", -1, "`emag_delta` is -1; perturbation cannot begin before"),
        ("blur_sigma", -0.5, "`blur_sigma` is -0.5; it must lie between 0.0 and inf"),
        ("blur_sigma", float("nan"), "`blur_sigma` is nan"),
    ],
)
def test_bad_windows_are_refused(option: str, value: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        EmagWindows(**{option: value})  # type: ignore[arg-type]


def test_the_unit_of_windows_is_made_of_its_text() -> None:
    request = GenerationRequest(prompt="x", height=64, width=64)
    assert amended(request, {"emag_unit": "steps"}).windows.unit is Unit.STEPS
    in_steps = amended(request, {"emag_unit": "steps", "emag_start": 4, "emag_delta": 1, "emag_stop": 2})
    counts = Counter(in_steps.windows.phases(10))
    assert counts == {Phase.TRACK: 1, Phase.GUIDE: 2, Phase.PLAIN: 7}
    assert amended(in_steps, {"steps": 20}).windows.unit is Unit.RUN, "they were steps of another run"
    with pytest.raises(InputError, match="there is no `emag_unit` 'minutes'; choose 250ths, steps"):
        amended(request, {"emag_unit": "minutes"})
