"""Comparing an engine with the reference: the sound one passes, damaged ones fail, and the report says so."""

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from emag_export.contract import DenoiserContract
from emag_export.engines.eager import EagerEngine
from emag_export.engines.observed import ObservedEngine
from emag_export.engines.protocol import Engine
from emag_export.errors import InputError
from emag_export.exporter.graph.fork import fork
from emag_export.families import FAMILIES
from emag_export.kinds import Variant
from emag_export.progress import Event
from emag_export.reference.compare import Pictures, compare
from emag_export.reference.comparison import Choice, Comparison
from emag_export.reference.report import write_report
from emag_export.reference.two_pass import ReferenceStep, two_pass_denoise
from emag_export.runtime.guidance.rules import Guidance, Rows
from emag_export.runtime.sampling.plan import Phase, Plan, make_plan
from emag_export.runtime.sampling.schedule import flow_match_schedule
from tests.reference_inputs import golden_model, random_inputs

STEPS = 8


@pytest.fixture(scope="module")
def model() -> SD3Transformer2DModel:
    return golden_model()


def plan_for(model: SD3Transformer2DModel, precision: str = "float32") -> Plan:
    contract = FAMILIES["sd3"].contract(
        model.config, variant=Variant.EMAG, blocks=(6, 7, 8), precision=precision
    )
    schedule = flow_match_schedule({"shift": 3.0}, STEPS, image_tokens=48)
    return make_plan(contract, schedule, Guidance())


def engine_of(model: SD3Transformer2DModel, contract: DenoiserContract) -> EagerEngine:
    return EagerEngine(fork(model, contract), contract.graph)


@pytest.fixture(scope="module")
def reference(model: SD3Transformer2DModel) -> list[ReferenceStep]:
    latents, conditioning = random_inputs(model, seed=14, tokens=7, size=(16, 12))
    return list(two_pass_denoise(model, plan_for(model), latents, conditioning))


def decode(latents: Rows) -> Pictures:
    """Three of the four channels as colours."""
    pixels = ((latents[:, :3].permute(0, 2, 3, 1) / 8 + 0.5).clamp(0, 1) * 255).round()
    return pixels.to(torch.uint8).numpy()


@pytest.fixture(scope="module")
def sound(model: SD3Transformer2DModel, reference: list[ReferenceStep]) -> Comparison:
    plan = plan_for(model)
    return compare(engine_of(model, plan.contract), plan, reference, decode=decode)


def test_the_fork_passes(sound: Comparison) -> None:
    """Measured: velocities to 5e-7 in one step, latents to 4e-6 in the free run."""
    assert sound.failures() == []
    assert sound.passed
    assert max(error.max_abs for step in sound.steps for error in step.errors.values()) < 1e-5
    assert min(error.cosine for step in sound.steps for error in step.errors.values()) > 0.9999
    assert max(step.max_abs for step in sound.free) < 1e-4
    assert all(step.agree for step in sound.free)


def test_only_what_a_phase_answers_for_is_judged(sound: Comparison) -> None:
    outputs = {
        Phase.PLAIN: {"uncond", "cond"},
        Phase.TRACK: {"uncond", "cond", "ema_state", "delta"},
        Phase.GUIDE: {"uncond", "cond", "perturbed", "ema_state", "delta"},
    }
    assert {step.phase for step in sound.steps} == set(Phase)
    for step in sound.steps:
        assert set(step.errors) == outputs[step.phase]
        assert len(step.choices) == (0 if step.phase == Phase.PLAIN else 2)


def test_the_choice_shown_is_the_one_of_the_next_step(sound: Comparison) -> None:
    for step, following in zip(sound.steps, sound.free[1:], strict=False):
        if step.phase != Phase.PLAIN and following.phase == Phase.GUIDE:
            assert following.reference_blocks == tuple((choice.reference,) for choice in step.choices)


def test_pictures_are_compared(sound: Comparison) -> None:
    assert len(sound.pictures) == 2
    for pair in sound.pictures:
        assert pair.psnr > 60  # one level of 255 everywhere is 48 dB
        assert pair.ssim > 0.9999
        assert pair.reference.shape == (16, 12, 3)


def test_a_generator_is_consumed_as_it_comes_and_progress_is_told(
    model: SD3Transformer2DModel, reference: list[ReferenceStep]
) -> None:
    plan = plan_for(model)
    told: list[Event] = []
    result = compare(engine_of(model, plan.contract), plan, iter(reference[:3]), progress=told.append)
    assert [(event.done, event.total) for event in told] == [(done, 2 * STEPS) for done in range(1, 7)]
    assert len(result.steps) == len(result.free) == 3
    assert result.pictures == ()


def test_one_changed_weight_fails(model: SD3Transformer2DModel, reference: list[ReferenceStep]) -> None:
    plan, damaged = plan_for(model), copy.deepcopy(model)
    with torch.no_grad():
        damaged.transformer_blocks[7].ff.net[2].weight[3, 5] += 0.5
    result = compare(engine_of(damaged, plan.contract), plan, reference)
    assert not result.passed
    assert any("step 0" in failure and "cond" in failure for failure in result.failures())


def tampered(engine: Engine, output: str, change: Callable[[Tensor], Tensor]) -> ObservedEngine:
    """Changes one output on its way out."""

    def after(feeds: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        with torch.inference_mode():
            outputs[output].copy_(change(outputs[output]))

    return ObservedEngine(engine, after=after)


@pytest.mark.parametrize(
    ("output", "change", "told"),
    [
        ("noise_pred", lambda x: x.where(x < x.max(), torch.nan), "cond differs by nan"),
        ("ema_state_out", lambda x: x * 1.001, "ema_state differs by 1.0e-03"),
        ("layer_delta", lambda x: x * 1.001, "delta differs by 1.0e-03"),
        ("layer_delta", lambda x: x.flip(1), "would next perturb block"),
    ],
)
def test_every_output_is_held_to_something(
    model: SD3Transformer2DModel,
    reference: list[ReferenceStep],
    output: str,
    change: Callable[[Tensor], Tensor],
    told: str,
) -> None:
    plan = plan_for(model)
    engine = tampered(engine_of(model, plan.contract), output, change)
    failures = compare(engine, plan, reference).failures()
    assert any(told in failure for failure in failures), failures


@pytest.mark.parametrize("factor", [1.002, 0.5], ids=["same choices", "other choices"])
def test_a_state_lost_between_steps_fails_in_the_free_run(
    model: SD3Transformer2DModel, reference: list[ReferenceStep], factor: float
) -> None:
    """Teacher-forced steps cannot show it: they are handed the right state every time."""
    calls = []

    def spoil_in_free_run(average: Tensor) -> Tensor:
        calls.append(average.shape)
        return average * factor if len(calls) > STEPS else average

    plan = plan_for(model)
    engine = tampered(engine_of(model, plan.contract), "ema_state_out", spoil_in_free_run)
    failures = compare(engine, plan, reference).failures()
    assert failures
    assert all(failure.startswith("free run") for failure in failures)


def test_a_tie_is_excused_and_said(sound: Comparison) -> None:
    def with_gap(gap: float) -> Comparison:
        choices = (Choice(reference=6, engine=8, gap=gap), *sound.steps[3].choices[1:])
        return replace(sound, steps=(replace(sound.steps[3], choices=choices),))

    tied, led = with_gap(1e-6), with_gap(1e-2)
    assert tied.passed
    assert "tie" in tied.ties()[0]
    assert led.ties() == []
    assert "block 8, the reference block 6" in led.failures()[0]
    assert replace(led, precision="float16").passed, "half precision reports choices and does not judge them"


def test_half_precision_passes_its_own_threshold(
    model: SD3Transformer2DModel, reference: list[ReferenceStep]
) -> None:
    plan = plan_for(model, "float16")
    engine = engine_of(golden_model(torch.float16), plan.contract)
    result = compare(engine, plan, reference)
    assert result.failures() == []
    assert not replace(result, precision="float32").passed
    assert result.floor is None


@pytest.mark.parametrize(("steps", "message"), [([], "has no step"), ([2], "is not step 0 of the plan")])
def test_a_reference_of_another_plan_is_refused(
    model: SD3Transformer2DModel, reference: list[ReferenceStep], steps: list[int], message: str
) -> None:
    plan = plan_for(model)
    with pytest.raises(InputError, match=message):
        compare(engine_of(model, plan.contract), plan, [reference[step] for step in steps])


def test_the_report_is_complete_and_escaped(sound: Comparison, tmp_path: Path) -> None:
    prompt = "a <b>fox</b> & $$ ${verdict}"
    data, figure, page = write_report(sound, tmp_path / "new" / "folder", notes={"prompt": prompt})
    assert figure.read_bytes().startswith(b"\x89PNG")
    html = page.read_text(encoding="utf-8")
    assert "a &lt;b&gt;fox&lt;/b&gt; &amp; $$ ${verdict}" in html
    assert "<b>fox" not in html
    assert html.count("data:image/png;base64,") == 2 * 3 + 1
    assert html.count('<tr class="guide">') == sum(step.phase == Phase.GUIDE for step in sound.steps)
    assert "http" not in html, "the page needs nothing from elsewhere"
    written = json.loads(data.read_text(encoding="utf-8"))
    assert written["passed"] is True
    assert written["settings"]["prompt"] == prompt
    assert len(written["steps"]) == len(written["free"]) == STEPS
    assert written["steps"][4]["errors"]["perturbed"]["max_abs"] < 1e-5
    assert set(written["pictures"][0]) == {"psnr", "ssim"}


def test_a_report_survives_what_is_not_finite(sound: Comparison, tmp_path: Path) -> None:
    step = sound.steps[0]
    broken = replace(step, errors={"cond": replace(step.errors["cond"], max_abs=float("nan"))})
    picture = replace(sound.pictures[0], engine=sound.pictures[0].reference, psnr=float("inf"), ssim=1.0)
    data, _, page = write_report(
        replace(sound, steps=(broken, *sound.steps[1:]), pictures=(picture,)), tmp_path
    )
    written = json.loads(data.read_text(encoding="utf-8"))
    assert written["steps"][0]["errors"]["cond"]["max_abs"] == "nan"
    assert written["pictures"] == [{"psnr": "inf", "ssim": 1.0}]
    assert written["passed"] is False
    html = page.read_text(encoding="utf-8")
    assert "cond differs by nan" in html
    assert "Largest velocity error nan (cond, step 0)" in html


def test_small_pictures_have_a_small_window(
    model: SD3Transformer2DModel, reference: list[ReferenceStep]
) -> None:
    plan = plan_for(model)

    def tiny(latents: Rows) -> Pictures:
        return decode(latents)[:, :4, :6]

    def thin(latents: Rows) -> Pictures:
        return np.ascontiguousarray(decode(latents)[:, :2])

    engine = engine_of(model, plan.contract)
    assert compare(engine, plan, reference[:1], decode=tiny).pictures[0].ssim == pytest.approx(1)
    with pytest.raises(InputError, match="at least 3"):
        compare(engine, plan, reference[:1], decode=thin)


def test_guidance_without_averages_is_compared_too(
    model: SD3Transformer2DModel, reference: list[ReferenceStep], tmp_path: Path
) -> None:
    contract = plan_for(model).contract
    plan = make_plan(contract, flow_match_schedule({"shift": 3.0}, 2, image_tokens=48), Guidance(name="cfg"))
    first = reference[0]
    steps = two_pass_denoise(model, plan, first.latents_before, first.conditioning)
    result = compare(engine_of(model, contract), plan, steps)
    assert result.passed
    assert not any(step.choices for step in result.steps)
    assert all(path.stat().st_size for path in write_report(result, tmp_path))
