"""Measurement: turns, medians, intervals, and the command on a real bundle."""

import json
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from emag_export.bench.contender import Contender
from emag_export.bench.race import WARM_UP_ROUNDS, race
from emag_export.bench.scaling import measure_scaling
from emag_export.bench.session import Setup
from emag_export.bench.timing import StepTime
from emag_export.bundle import Bundle
from emag_export.cli.main import main
from emag_export.errors import InputError
from emag_export.families import FAMILIES
from emag_export.kinds import Variant
from emag_export.progress import Event
from emag_export.runtime.guidance.rules import Guidance
from emag_export.runtime.request import default_request
from emag_export.runtime.sampling.plan import Phase, make_plan
from emag_export.runtime.sampling.schedule import flow_match_schedule
from tests.bundles import opener

STEPS = 28
SECONDS = {Phase.PLAIN: 2.0, Phase.TRACK: 2.0, Phase.GUIDE: 2.75}


@pytest.fixture
def contender() -> Callable[..., Contender]:
    """(guidance, log, jitter, steps) to a contender whose steps take exactly what a row-block costs."""

    family = FAMILIES["sd3"]
    config = family.configs["sd3"]["transformer"]
    contract = family.contract(config, variant=Variant.EMAG_Q, blocks=(6, 7, 8))

    def make(
        guidance: str, log: list[str] | None = None, jitter: float = 0.0, steps: int = STEPS
    ) -> Contender:
        schedule = flow_match_schedule({"shift": 3.0}, steps, 4096)
        plan = make_plan(contract, schedule, Guidance(name=guidance))

        def run() -> Generator[StepTime, None, None]:
            try:
                for step in plan.steps:
                    if log is not None:
                        log.append(guidance)
                    seconds = SECONDS[step.phase] * (1 + jitter * (step.index % 2))
                    first = plan.steps[step.index - 1].phase is not step.phase
                    yield StepTime(phase=step.phase, seconds=99.0 if first else seconds, engine=seconds - 0.1)
            finally:
                if log is not None:
                    log.append(f"{guidance} closed")

        return Contender(
            method=guidance,
            engine="clock",
            plan=plan,
            images=1,
            device=torch.device("cpu"),
            repeats_model=False,
            steps=run,
        )

    return make


def test_contenders_take_turns_and_change_who_begins(contender: Callable[..., Contender]) -> None:
    log: list[str] = []
    race([contender("cfg", log), contender("emag", log)])
    assert log[:6] == ["cfg", "emag", "emag", "cfg", "cfg", "emag"]
    assert log.count("cfg") == log.count("emag") == STEPS


def test_first_step_of_a_phase_is_no_measurement(contender: Callable[..., Contender]) -> None:
    (result,) = race([contender("emag")], rounds=2)
    assert len(result.times) == 2 * STEPS - 3  # three phases warm up once; a later first step does count
    assert result.seconds() == pytest.approx(10 * 2.0 + 18 * 2.75)


def test_ratio_is_that_of_the_row_blocks_and_lies_in_its_interval(
    contender: Callable[..., Contender],
) -> None:
    cfg, emag = race([contender("cfg", jitter=0.02), contender("emag", jitter=0.02)])
    ratio = emag.ratio(cfg)
    assert ratio.low <= ratio.value <= ratio.high
    assert ratio.low < ratio.high
    assert ratio.value == pytest.approx(1668 / 1344, rel=0.03)  # half of the steps take 2 % longer
    assert emag.contender.row_blocks() == 1668
    longer = emag.contender.row_blocks(50) / cfg.contender.row_blocks(50)
    assert emag.ratio(cfg, steps=50).value == pytest.approx(longer, rel=0.03)
    with pytest.raises(InputError, match="phase guide, which the measured steps had not"):
        replace(emag, times=tuple(t for t in emag.times if t.phase != Phase.GUIDE)).seconds()


def test_share_outside_the_engine(contender: Callable[..., Contender]) -> None:
    (result,) = race([contender("cfg")])
    assert result.outside_engine == pytest.approx(0.05)


@pytest.mark.parametrize(("device", "steps"), [("cuda", 4), ("cuda", STEPS), ("cpu", 4)])
def test_calls_that_capture_are_no_measurement(
    contender: Callable[..., Contender], device: str, steps: int
) -> None:
    """The first two calls of a kind are slow, as on engines that capture, whichever round they are in."""

    def capturing(guidance: str) -> Contender:
        made = contender(guidance, steps=steps)
        calls: Counter[tuple[bool, int]] = Counter()

        def run() -> Generator[StepTime, None, None]:
            for step in made.plan.steps:
                kind = step.phase == Phase.GUIDE, step.index % 2
                calls[kind] += 1
                yield StepTime(phase=step.phase, seconds=SECONDS[step.phase] + 9.0 * (calls[kind] <= 2))

        return replace(made, device=torch.device(device), steps=run)

    cfg, emag = race([capturing("cfg"), capturing("emag")])
    predicted = emag.contender.row_blocks() / cfg.contender.row_blocks()
    assert len(cfg.times) == steps - 1
    if device == "cuda":
        assert emag.ratio(cfg).value == pytest.approx(predicted)
    else:  # nothing captures on a CPU, so no round is spent on it
        assert cfg.seconds() == steps * (SECONDS[Phase.PLAIN] + 9.0)


def test_on_a_gpu_whole_rounds_come_first(contender: Callable[..., Contender]) -> None:
    log: list[str] = []
    seen: list[Event] = []
    here, there = contender("cfg", log), replace(contender("emag", log), device=torch.device("cuda"))
    race([here, there], progress=seen.append)
    warm_up = [*["emag"] * STEPS, "emag closed"] * WARM_UP_ROUNDS
    assert log[: len(warm_up)] == warm_up  # only what is on the GPU
    assert log[len(warm_up) :].count("cfg") == log[len(warm_up) :].count("emag") == STEPS
    assert [event.done for event in seen] == list(range(1, (WARM_UP_ROUNDS + 2) * STEPS + 1))
    assert {event.total for event in seen} == {(WARM_UP_ROUNDS + 2) * STEPS}


def test_interrupted_race_closes_every_run(contender: Callable[..., Contender]) -> None:
    log: list[str] = []

    def interrupt(event: Event) -> None:
        if event.done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        race([contender("cfg", log), contender("emag", log)], progress=interrupt)
    assert log[-2:] == ["cfg closed", "emag closed"]


def test_bundles_of_different_models_are_refused(small_bundle: Path, tiny_bundle: Path) -> None:
    small, tiny = Bundle(small_bundle), Bundle(tiny_bundle)
    request = default_request(small, "x")
    with pytest.raises(InputError, match="another model"):
        Setup(bundles=[small, tiny], backends={}, request=request)
    with pytest.raises(InputError, match="measured beside EMAG anyway"):
        Setup(bundles=[small], backends={}, request=replace(request, guidance=Guidance(name="cfg")))


def test_scaling_has_a_point_for_every_value(small_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four blocks: wherever the candidates lie, what is predicted is counted from there."""
    axes = {"image tokens": (4, 16), "images": (2,), "steps": (4, 6), "first candidate": (0.0, 0.5)}
    monkeypatch.setattr("emag_export.bench.scaling.AXES", axes)
    bundle = Bundle(small_bundle)
    request = replace(default_request(bundle, "x"), height=32, width=32, steps=6)
    setup = Setup(bundles=[bundle], backends={"onnxruntime": lambda _: opener()}, request=request)
    points = measure_scaling(setup)
    assert [(point.axis, point.value) for point in points] == [
        ("image tokens", 4),
        ("image tokens", 16),
        ("images", 2),
        ("steps", 4),
        ("steps", 6),
        ("first candidate", 0),
        ("first candidate", 2),
    ]
    guided = 4  # of six steps
    assert points[-2].row_blocks == pytest.approx(1 + guided * 4 / (6 * 2 * 4))
    assert points[-1].row_blocks == pytest.approx(1 + guided * 2 / (6 * 2 * 4))
    assert all(point.low <= point.ratio <= point.high for point in points)


def test_command_measures_everything_and_writes_it_down(small_bundle: Path, tmp_path: Path) -> None:
    """Ratios only where there is something to divide by; the released algorithm beside ours."""
    command = ["-q", "bench", str(small_bundle), "--steps", "6", "--height", "32", "--width", "32"]
    found = CliRunner().invoke(
        main, [*command, "--no-memory", "--startup", "--json", "-o", str(tmp_path / "out")]
    )
    assert found.exit_code == 0, found.output
    report = json.loads(found.stdout)
    rows = {(row["method"], row["engine"]): row for row in report["results"]}
    assert set(rows) == {
        ("cfg", "onnxruntime (cpu)"),
        ("emag", "onnxruntime (cpu)"),
        ("cfg", "PyTorch eager"),
        ("two-pass emag", "PyTorch eager"),
    }
    ours = rows["emag", "onnxruntime (cpu)"]
    assert set(ours["phases"]) == {"plain", "track", "guide"}
    assert sum(phase["steps"] for phase in ours["phases"].values()) == 6
    for key in ("to_cfg", "to_pytorch_cfg", "to_two_pass"):
        assert 0 < ours[key]["low"] <= ours[key]["ratio"] <= ours[key]["high"]
    assert rows["cfg", "onnxruntime (cpu)"]["to_cfg"] is None
    assert report["startup"]["open"] > 0
    assert json.loads((tmp_path / "out" / "bench.json").read_text("utf-8")) == report
    assert (tmp_path / "out" / "cost.png").read_bytes().startswith(b"\x89PNG")
