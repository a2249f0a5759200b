"""The floor: what PyTorch itself loses in half precision is measured, shown, and held against the engine."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from emag_export.contract import DenoiserContract
from emag_export.engines.eager import EagerEngine
from emag_export.engines.observed import ObservedEngine
from emag_export.engines.protocol import TORCH_DTYPES, Engine
from emag_export.exporter.graph.fork import fork
from emag_export.families import FAMILIES
from emag_export.kinds import Variant
from emag_export.reference.compare import compare
from emag_export.reference.comparison import Comparison
from emag_export.reference.forced import force_step, with_floor
from emag_export.reference.report import write_report
from emag_export.reference.two_pass import ReferenceStep, two_pass_denoise
from emag_export.runtime.guidance.rules import Guidance
from emag_export.runtime.sampling.plan import Plan, make_plan
from emag_export.runtime.sampling.schedule import flow_match_schedule
from tests.reference_inputs import golden_model, random_inputs

HALF = ("float16", "bfloat16")
STEPS = 4


def plan_for(precision: str) -> Plan:
    contract = FAMILIES["sd3"].contract(
        golden_model().config, variant=Variant.EMAG_Q, blocks=(6, 7, 8), precision=precision
    )
    return make_plan(contract, flow_match_schedule({"shift": 3.0}, STEPS, image_tokens=24), Guidance())


def engine_of(contract: DenoiserContract) -> EagerEngine:
    model = golden_model(TORCH_DTYPES[contract.precision])
    return EagerEngine(fork(model, contract), contract.graph)


@pytest.fixture(scope="module")
def reference() -> list[ReferenceStep]:
    model = golden_model()
    return list(two_pass_denoise(model, plan_for("float16"), *random_inputs(model)))


def steps_for(plan: Plan, reference: list[ReferenceStep]) -> Iterator[ReferenceStep]:
    return with_floor(reference, plan, lambda: engine_of(plan.contract))


def coarse(engine: Engine, bits: int) -> ObservedEngine:
    """Rounds its velocities to fewer bits than the precision has, as a graph that lost some would."""

    def after(feeds: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        mantissa, exponent = torch.frexp(outputs["noise_pred"].float())
        with torch.inference_mode():
            outputs["noise_pred"].copy_(torch.ldexp((mantissa * 2**bits).round() / 2**bits, exponent))

    return ObservedEngine(engine, after=after)


@pytest.fixture(scope="module")
def itself(reference: list[ReferenceStep]) -> Comparison:
    """PyTorch in float16 against its own floor."""
    plan = plan_for("float16")
    return compare(engine_of(plan.contract), plan, steps_for(plan, reference))


@pytest.mark.parametrize("precision", HALF)
def test_pytorch_lies_on_its_own_floor(reference: list[ReferenceStep], precision: str) -> None:
    plan = plan_for(precision)
    result = compare(engine_of(plan.contract), plan, steps_for(plan, reference))
    assert result.failures() == []
    assert result.floor is not None
    assert result.floor.ratio == 1
    for step in result.steps:
        assert step.floor == step.errors


def test_the_floor_is_the_worst_velocity_of_every_step(
    itself: Comparison, reference: list[ReferenceStep]
) -> None:
    plan = plan_for("float16")
    worst = max(
        error.relative
        for step in reference
        for name, error in force_step(engine_of(plan.contract), plan, step).errors.items()
        if name not in ("ema_state", "delta")
    )
    assert itself.floor is not None
    assert itself.floor.floor == itself.floor.engine == worst


def test_an_engine_that_loses_more_than_its_precision_fails_though_the_threshold_would_pass_it(
    reference: list[ReferenceStep],
) -> None:
    """Measured: seven bits cost 0.73 % of the largest velocity, PyTorch's float16 0.16 %; 2 % are allowed."""
    plan = plan_for("float16")
    engine = coarse(engine_of(plan.contract), bits=7)
    assert compare(engine, plan, reference).passed, "without a floor nobody can tell"
    failures = compare(engine, plan, steps_for(plan, reference)).failures()
    assert len(failures) == 1
    assert "times what PyTorch loses in float16; 1.5 times is allowed" in failures[0]


def changed(comparison: Comparison, change: Callable[[float], float]) -> Comparison:
    """The first step's error of the conditional velocity replaced, on the engine's side."""
    first = comparison.steps[0]
    error = replace(first.errors["cond"], relative=change(first.errors["cond"].relative))
    step = replace(first, errors={**first.errors, "cond": error})
    return replace(comparison, steps=(step, *comparison.steps[1:]))


def test_one_lucky_step_of_pytorch_does_not_fail_an_engine(itself: Comparison) -> None:
    """How lucky PyTorch is in a step depends on the processor: here it is given luck."""
    assert itself.floor is not None
    usual, first = itself.floor.floor, itself.steps[0]
    lucky = replace(first, floor={"cond": replace(first.floor["cond"], relative=usual / 3)})
    comparison = replace(itself, steps=(lucky, *itself.steps[1:]))
    assert changed(comparison, lambda _: usual).passed, "it is as good as PyTorch usually is"


def test_nan_is_the_worst_error_on_either_side(itself: Comparison) -> None:
    assert any("nan times" in failure for failure in changed(itself, lambda _: float("nan")).failures())
    first = itself.steps[0]
    broken = replace(first, floor={"cond": replace(first.floor["cond"], relative=float("nan"))})
    unsound = replace(itself, steps=(broken, *itself.steps[1:]))
    assert not unsound.passed, "a floor that is no number excuses nothing"


def test_the_floor_is_in_every_report(itself: Comparison, tmp_path: Path) -> None:
    data, _, page = write_report(itself, tmp_path)
    written = json.loads(data.read_text("utf-8"))
    assert written["floor"]["ratio"] == 1
    assert written["steps"][0]["floor"]["cond"] == written["steps"][0]["errors"]["cond"]
    assert "PyTorch itself loses" in page.read_text("utf-8")
    plain = replace(itself, steps=tuple(replace(step, floor={}) for step in itself.steps))
    data, _, page = write_report(plain, tmp_path)
    assert json.loads(data.read_text("utf-8"))["floor"] is None
    assert "was not measured" in page.read_text("utf-8")
