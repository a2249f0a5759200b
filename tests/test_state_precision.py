"""Averages kept in float16 between steps: what is stored, how much it loses, and how it is judged."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from emag_export.contract import DenoiserContract
from emag_export.engines.eager import EagerEngine
from emag_export.engines.ort import OnnxRuntimeEngine, OrtOptions
from emag_export.errors import InputError
from emag_export.exporter.graph.examples import DENOISER_CHECK_SIZES, DENOISER_EXAMPLE_SIZES, random_inputs
from emag_export.exporter.graph.fork import Forked, fork
from emag_export.exporter.graph.onnx_export import export_graph
from emag_export.families import FAMILIES
from emag_export.kinds import Variant
from emag_export.options import BuildOptions
from emag_export.reference.compare import compare
from emag_export.reference.two_pass import two_pass_denoise
from emag_export.runtime.guidance.rules import Guidance
from emag_export.runtime.sampling.plan import make_plan
from emag_export.runtime.sampling.schedule import flow_match_schedule
from emag_export.runtime.sampling.state import RunState
from tests.conftest import small_fork
from tests.reference_inputs import golden_model
from tests.reference_inputs import random_inputs as noise_and_prompts

SIZES = DENOISER_CHECK_SIZES[1]
A = 1 - 0.988
STEPS = 23
"""Accumulations of the default windows in 28 steps."""
HALF_ULP, SUBNORMAL = 2**-11, 2**-25
"""Rounding to float16 moves a value by at most this fraction, or this much where it is subnormal."""


def in_half(contract: DenoiserContract) -> DenoiserContract:
    return replace(contract, state_dtype="float16")


def averages(forked: Forked) -> list[Tensor]:
    """After every step, each with other latents; nothing is replaced, so that X depends on no average."""
    spec = forked.contract.graph
    state = random_inputs(spec, SIZES)["ema_state"].zero_()
    states = []
    with EagerEngine(forked, spec) as engine:
        for step in range(STEPS):
            feeds = random_inputs(spec, SIZES, seed=step)
            feeds["layer_mask"] = torch.zeros_like(feeds["layer_mask"])
            feeds["ema_step"] = torch.full_like(feeds["ema_step"], A if step else 1.0)
            state = engine.run({**feeds, "ema_state": state})["ema_state_out"]
            states.append(state)
    return states


@pytest.mark.parametrize("variant", [Variant.EMAG_Q, Variant.EMAG])
def test_only_what_is_stored_is_rounded(variant: Variant) -> None:
    """e' = (1 - a) e + one rounding, element by element: what float32 inside a step promises."""
    fine = small_fork("sd3", variant)
    coarse = fork(fine.model, in_half(fine.contract))
    exact, stored = averages(fine), averages(coarse)
    assert torch.equal(stored[0], exact[0].half()), "a = 1 from zeros stores X itself"
    bound = torch.zeros_like(exact[0])
    for wanted, got in zip(exact, stored, strict=True):
        assert got.dtype is torch.float16
        # 1 % more for what float32 itself rounds in a step, 2^-24 and thus 0.01 % of half an ulp of float16.
        bound = (1 - A) * bound + 1.01 * HALF_ULP * got.float().abs() + SUBNORMAL
        assert bool(((got.float() - wanted).abs() <= bound).all())


def test_the_graph_takes_and_gives_float16(tmp_path: Path) -> None:
    fine = small_fork("sd3")
    coarse = fork(fine.model, in_half(fine.contract))
    spec, path = coarse.contract.graph, tmp_path / "model.onnx"
    export_graph(coarse, spec, random_inputs(spec, DENOISER_EXAMPLE_SIZES), path)
    feeds = random_inputs(spec, SIZES, seed=1)
    with EagerEngine(coarse, spec) as eager, OnnxRuntimeEngine(path, spec, OrtOptions(threads=1)) as engine:
        wanted, got = eager.run(feeds), engine.run(feeds)
    assert feeds["ema_state"].dtype is got["ema_state_out"].dtype is torch.float16
    assert got["noise_pred"].dtype is torch.float32
    # Two values that differ by float32's rounding, 3e-6 here, may be stored as neighbours: twice half an ulp.
    kept, expected = got["ema_state_out"].float(), wanted["ema_state_out"].float()
    assert bool(((kept - expected).abs() <= 2 * HALF_ULP * expected.abs() + 1e-5).all())
    # As float32 graphs: measured 3e-6 on ten blocks.
    torch.testing.assert_close(got["noise_pred"], wanted["noise_pred"], rtol=1e-4, atol=1e-4)


def test_compare_has_thresholds_of_its_own_for_it() -> None:
    """Tighter than float16's: velocities, Delta, choices and the free run are all judged."""
    model = golden_model()
    contract = FAMILIES["sd3"].contract(
        model.config, variant=Variant.EMAG_Q, blocks=(6, 7, 8), state_dtype="float16"
    )
    plan = make_plan(contract, flow_match_schedule({"shift": 3.0}, 8, image_tokens=24), Guidance())
    latents, conditioning = noise_and_prompts(model)

    engine = EagerEngine(fork(model, contract), contract.graph)
    reference = list(two_pass_denoise(model, plan, latents, conditioning))
    result = compare(engine, plan, reference)
    assert result.failures() == []
    assert result.precision == "float32 with float16 averages"
    assert not replace(result, precision="float32").passed, "half an ulp of float16 is no float32 rounding"
    errors = [step.errors["ema_state"].relative for step in result.steps if "ema_state" in step.errors]
    # One rounding of the average that is fed, one of the average that is stored.
    assert HALF_ULP / 2 < max(errors) <= 2.02 * HALF_ULP
    free = result.free[-1]
    assert result.threshold.free is not None
    broken = replace(result, free=(*result.free[:-1], replace(free, max_abs=2 * result.threshold.free)))
    assert "is the state handed on unchanged?" in broken.failures()[0]
    assert RunState.start(contract, latents, conditioning.given).average.dtype is torch.float16


def test_averages_in_bfloat16_are_refused() -> None:
    with pytest.raises(InputError, match="no state precision 'bfloat16'; choose fp32, fp16"):
        BuildOptions(state_precision="bfloat16")
