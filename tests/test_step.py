"""One step: images of any step, count and guidance share a call, join and leave, and are not changed."""

import random
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from emag_export.engines.function import FunctionEngine
from emag_export.errors import ContractError, InputError
from emag_export.kinds import Variant
from emag_export.runtime.guidance.apg import ApgConfig
from emag_export.runtime.guidance.clean import Clean
from emag_export.runtime.guidance.rules import Guidance, Terms
from emag_export.runtime.loop import denoise
from emag_export.runtime.sampling.call import ImageStep, calls_of, place_calls
from emag_export.runtime.sampling.conditioning import Conditioning
from emag_export.runtime.sampling.plan import Phase, make_plan
from emag_export.runtime.sampling.schedule import Schedule
from emag_export.runtime.sampling.state import RunState
from emag_export.runtime.step import step
from tests import sd3
from tests.mixtures import FORKS, PreciseEngine, Request, alone, prepared_request, some_request
from tests.thinned import mostly_slow

CPU = torch.device("cpu")
# The model computes in float64, so that matrix products of a larger batch add up to the same float32 numbers;
# measured: no difference at all. In float32 the order of the sums alone moves latents of this peaky model by
# up to 1.2e-5 of their largest.
ALIKE = 1e-5


SOME = (Variant.EMAG_Q, Variant.IDENTITY, Variant.SKIP)
OF_TEXT = {Variant.EMAG_I, Variant.EMAG_T}
EVERY = [
    *(("sd3", kind) for kind in Variant),
    *(("dit", kind) for kind in Variant if kind not in OF_TEXT),
    *((family, kind) for family in FORKS if family not in ("sd3", "dit") for kind in SOME),
]
"""Family and kind of negative."""


@pytest.fixture(scope="module", params=EVERY, ids="-".join)
def every(request: pytest.FixtureRequest) -> PreciseEngine:
    """Engines of every kind of negative, on every family."""
    family, kind = request.param
    return PreciseEngine(kind, family)


@pytest.fixture(scope="module", params=[Variant.EMAG_Q, Variant.EMAG])
def engine(request: pytest.FixtureRequest) -> PreciseEngine:
    return PreciseEngine(request.param)


def by_itself(engine: PreciseEngine, request: Request) -> Tensor:
    return alone(engine, replace(prepared_request(request, 0), anneal=None))


def served(engine: PreciseEngine, requests: list[Request], generator: random.Random) -> dict[int, Tensor]:
    """Every request's latents from a loop in which images join and leave between steps, in any order."""
    waiting, finished = list(range(len(requests))), {}
    live: list[tuple[int, int]] = []  # (request, its next step)
    state: RunState | None = None
    given: Conditioning | None = None
    while waiting or live:
        joining = waiting[: generator.randint(0 if live else 1, 3)]
        waiting = waiting[len(joining) :]
        for number in joining:
            new = requests[number]
            start = RunState.start(engine.contract, new.latents, new.conditioning.given)
            state = start if state is None else RunState.cat([state, start])
            given = new.conditioning if given is None else Conditioning.cat([given, new.conditioning])
            live.append((number, 0))
        assert state is not None and given is not None
        images = [
            ImageStep(step=requests[number].plan.steps[index], guidance=requests[number].plan.guidance)
            for number, index in live
        ]
        (call,) = place_calls([images], engine.contract, CPU)
        state, _ = step(engine, call, state, given.trunk(call.rows))
        live = [(number, index + 1) for number, index in live]
        staying = []
        for position, (number, index) in enumerate(live):
            if index == len(requests[number].plan.steps):
                finished[number] = state.latents[position : position + 1].clone()
            else:
                staying.append(position)
        if len(staying) < len(live):
            generator.shuffle(staying)
            live = [live[position] for position in staying]
            state = state.select(staying) if staying else None
            given = given.select(staying) if staying else None
    return finished


@pytest.mark.parametrize("seed", mostly_slow(range(6), 0))
def test_modifiers_are_each_images_own(engine: PreciseEngine, seed: int) -> None:
    """Intervals, rescaling, CFG-Zero*, TCFG and guided channels, some of which share a call."""
    generator = random.Random(seed)
    requests = [some_request(engine, generator, modified=True) for _ in range(8)]
    assert len({request.plan.guidance.modifiers for request in requests}) > 4
    for number, latents in served(engine, requests, generator).items():
        wanted = by_itself(engine, requests[number])
        error = float((latents - wanted).abs().max() / wanted.abs().max())
        assert error <= ALIKE, (number, requests[number].plan.guidance)


def test_outside_its_interval_an_image_sends_no_unconditional_row(engine: PreciseEngine) -> None:
    """Beside others that do, and alone without a negative prompt."""
    generator = random.Random(1)
    inside, outside = (some_request(engine, generator, name="emag") for _ in range(2))
    guidance = replace(outside.plan.guidance, interval=(0.9, 0.9))
    planned = replace(outside.plan.steps[1], rule=guidance.rule_at(1, len(outside.plan.steps)))
    images = [
        ImageStep(step=inside.plan.steps[1], guidance=inside.plan.guidance),
        ImageStep(step=planned, guidance=guidance),
    ]
    (call,) = place_calls([images], engine.contract, CPU)
    assert call.rows.trunk_images.tolist() == [0, 0, 1]
    (alone_call,) = place_calls([images[1:]], engine.contract, CPU)
    positive = replace(outside.conditioning, negative=None)
    state = RunState.start(engine.contract, outside.latents, positive.given)
    _, found = step(engine, alone_call, state, positive.trunk(alone_call.rows))
    assert found.predictions.uncond is None


@pytest.mark.parametrize("seed", mostly_slow(range(3), 0))
def test_a_random_mixture_gives_each_image_what_it_has_alone(every: PreciseEngine, seed: int) -> None:
    generator = random.Random(seed)
    requests = [some_request(every, generator, name=name) for name in ("emag", *[None] * 6)]
    phases = {step.phase for request in requests for step in request.plan.steps}
    assert phases >= {Phase.PLAIN, Phase.GUIDE}
    for number, latents in served(every, requests, generator).items():
        wanted = by_itself(every, requests[number])
        error = float((latents - wanted).abs().max() / wanted.abs().max())
        assert error <= ALIKE, (number, requests[number].plan.guidance.name)


def test_a_mixture_holds_images_with_and_without_unconditional_rows(engine: PreciseEngine) -> None:
    """The rows that are sent are only those that somebody needs."""
    generator = random.Random(1)
    requests = [some_request(engine, generator, name=name) for name in ("emag-only", "cfg", "emag-only")]
    images = [ImageStep(step=r.plan.steps[1], guidance=r.plan.guidance) for r in requests]
    assert [image.step.phase for image in images] != [Phase.PLAIN] * 3
    (call,) = place_calls([images], engine.contract, CPU)
    assert call.rows.trunk_images.tolist() == [1, 0, 1, 2]
    sent: list[int] = []
    spec = engine.contract.graph

    def count(feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        sent.append(feeds["hidden_states"].shape[0])
        return {}

    counting = FunctionEngine(spec, count)
    state = RunState.cat([RunState.start(engine.contract, r.latents, r.conditioning.given) for r in requests])
    given = Conditioning.cat([r.conditioning for r in requests])
    step(counting, call, state, given.trunk(call.rows))
    assert sent == [4]


def test_a_run_of_one_plan_is_the_same_calls_placed_one_by_one(engine: PreciseEngine) -> None:
    """Bit for bit: what is placed before the run is what a server places on the spot."""
    request = some_request(engine, random.Random(3), name="emag+apg")
    images, plan = 1, request.plan
    whole = place_calls(calls_of(plan, images), engine.contract, CPU)
    state = RunState.start(engine.contract, request.latents, request.conditioning.given)
    for planned, placed in zip(plan.steps, whole, strict=True):
        (call,) = place_calls([[ImageStep(step=planned, guidance=plan.guidance)]], engine.contract, CPU)
        assert torch.equal(call.a, placed.a) and torch.equal(call.timestep, placed.timestep)
        assert [group.images for group in call.groups] == [None], "nothing is gathered where all are alike"
        state, _ = step(engine, call, state, request.conditioning.trunk(call.rows))
    assert torch.equal(state.latents, by_itself(engine, request))


def test_states_are_selected_and_joined(engine: PreciseEngine) -> None:
    generator = random.Random(5)
    requests = [some_request(engine, generator, name="apg") for _ in range(3)]
    states = [RunState.start(engine.contract, r.latents, r.conditioning.given) for r in requests]
    states = [
        replace(state, delta=state.delta + i, momentum=state.momentum - i) for i, state in enumerate(states)
    ]
    joined = RunState.cat(states)
    assert joined.images == 3
    for order in ([2, 0], [1, 2], [0]):
        chosen = joined.select(order)
        for name in ("latents", "average", "delta", "momentum"):
            wanted = torch.cat([getattr(states[i], name) for i in order])
            assert torch.equal(getattr(chosen, name), wanted), name
        assert chosen.spare.shape == chosen.average.shape
        pointers = {t.data_ptr() for t in (chosen.average, chosen.spare, joined.average, joined.spare)}
        assert len(pointers) == 4, "a selected state shares no memory"


def test_what_differs_in_size_cannot_share_a_call(engine: PreciseEngine) -> None:
    request = some_request(engine, random.Random(5), name="cfg")
    given = request.conditioning
    state = RunState.start(engine.contract, request.latents, given.given)
    wide = RunState.start(engine.contract, request.latents.repeat(1, 1, 1, 2), given.given)
    with pytest.raises(ContractError, match="group them"):
        RunState.cat([state, wide])
    longer = Conditioning(
        given={**given.given, sd3.EMBEDS: given.given[sd3.EMBEDS].repeat(1, 2, 1)}, negative=given.negative
    )
    with pytest.raises(ContractError, match="one call takes images of one size"):
        Conditioning.cat([given, longer])
    with pytest.raises(ContractError, match="pooled_projections is missing"):
        RunState.start(engine.contract, request.latents, {sd3.EMBEDS: given.given[sd3.EMBEDS]})


def test_noise_is_added_with_the_variance_of_its_image(engine: PreciseEngine) -> None:
    """A sampler that adds noise beside one that does not, on an engine that predicts nothing."""
    request = some_request(engine, random.Random(7), name="cfg")
    quiet = request.plan.steps[0]
    loud = replace(quiet, log_variance=(-2.0, 3.0))
    images = [ImageStep(step=s, guidance=request.plan.guidance) for s in (quiet, loud)]
    (call,) = place_calls([images], engine.contract, CPU)
    state = RunState.start(engine.contract, request.latents, request.conditioning.given)
    state = RunState.cat([state, state])
    given = Conditioning.cat([request.conditioning] * 2)
    still = FunctionEngine(
        engine.contract.graph, lambda feeds: {"noise_pred": torch.zeros(len(feeds["branch_rows"]), 1, 1, 1)}
    )
    with pytest.raises(InputError, match="adds noise"):
        step(still, call, state, given.trunk(call.rows))
    z = torch.randn(2, *request.latents.shape[1:])
    after, _ = step(still, call, state, given.trunk(call.rows), noise=z)
    assert torch.equal(after.latents[0], state.latents[0])
    torch.testing.assert_close(after.latents[1], state.latents[1] + torch.exp(torch.tensor(-1.0)) * z[1])


def test_blocks_are_perturbed_as_chosen_or_as_delta_says(engine: PreciseEngine) -> None:
    """By their strength, and none where nothing is perturbed; side by side, and one by one."""
    request = some_request(engine, random.Random(11), name="emag")
    guided = replace(request.plan.steps[0], phase=Phase.GUIDE, strength=0.5, choice=None)
    steps = [guided, replace(guided, strength=0.25, choice=(1.0, 0.0))]
    steps.append(replace(guided, phase=Phase.PLAIN, strength=0.0))
    wanted = [[0.0, 0.5], [0.25, 0.0], [0.0, 0.0]]
    start = RunState.start(engine.contract, request.latents, request.conditioning.given)
    start = replace(start, delta=torch.tensor([[1.0, 2.0]]))
    for chosen in ([0, 1, 2], [2, 0], [1], [0], [2]):
        images = [ImageStep(step=steps[i], guidance=request.plan.guidance) for i in chosen]
        (call,) = place_calls([images], engine.contract, CPU)
        given = Conditioning.cat([request.conditioning] * len(chosen))
        state = RunState.cat([start] * len(chosen))
        _, found = step(FunctionEngine(engine.contract.graph), call, state, given.trunk(call.rows))
        assert found.mask.tolist() == [wanted[i] for i in chosen]


def test_numbers_of_an_image_are_those_of_its_guidance_and_step(engine: PreciseEngine) -> None:
    """Each under its own name, on the device as on the host."""
    apg = ApgConfig(scale=5.0, eta=0.25, norm_threshold=6.0, momentum=-0.75)
    guidance = Guidance(name="emag+apg", scale=3.0, emag_scale=1.25, rescale=0.5, apg=apg)
    planned = some_request(engine, random.Random(11), name="apg").plan.steps[0]
    planned = replace(planned, rule=guidance.rule, p=0.875, q=-0.375)
    (call,) = place_calls([[ImageStep(step=planned, guidance=guidance)]], engine.contract, CPU)
    (group,) = call.groups
    wanted = Terms.of(guidance, Clean.of(0.875, -0.375))
    for name in ("scale", "emag_scale", "rescale"):
        assert getattr(group.terms, name).item() == getattr(wanted, name), name
    for part in ("apg", "clean"):
        numbers = {name: value.item() for name, value in vars(getattr(group.terms, part)).items()}
        assert numbers == vars(getattr(wanted, part))


def test_two_kinds_of_guidance_in_a_call(engine: PreciseEngine) -> None:
    """One picture along u + w(c - u), the other along p + s(c - p), written out."""
    generator = random.Random(13)
    requests = [some_request(engine, generator, name=name) for name in ("cfg", "emag-only")]
    images = [
        ImageStep(step=replace(r.plan.steps[0], phase=phase, strength=1.0), guidance=r.plan.guidance)
        for r, phase in zip(requests, (Phase.PLAIN, Phase.GUIDE), strict=True)
    ]
    (call,) = place_calls([images], engine.contract, CPU)
    state = RunState.cat([RunState.start(engine.contract, r.latents, r.conditioning.given) for r in requests])
    given = Conditioning.cat([r.conditioning for r in requests])
    _, found = step(engine, call, state, given.trunk(call.rows))
    u, c, p = found.predictions.uncond, found.predictions.cond, found.predictions.perturbed
    w, s = requests[0].plan.guidance.scale, requests[1].plan.guidance.emag_scale
    assert u is not None
    torch.testing.assert_close(found.guided[0], u[0] + w * (c[0] - u[0]))
    torch.testing.assert_close(found.guided[1], p[1] + s * (c[1] - p[1]))


def test_delta_counts_where_there_is_an_older_average(engine: PreciseEngine) -> None:
    """Not where nothing is averaged, nor at the first accumulation; per image, or for all that are alike."""
    request = some_request(engine, random.Random(11), name="emag")
    tracked = replace(request.plan.steps[0], phase=Phase.TRACK, starts_average=False, ema_step=0.5)
    steps = {
        "plain": replace(tracked, phase=Phase.PLAIN, ema_step=0.0),
        "first": replace(tracked, starts_average=True, ema_step=1.0),
        "tracked": tracked,
        "guided": replace(tracked, phase=Phase.GUIDE, strength=1.0),
    }
    counts = {"plain": False, "first": False, "tracked": True, "guided": True}
    layers = len(engine.contract.blocks)

    def measuring(feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"layer_delta": torch.full((len(feeds["layer_mask"]), layers), 7.0)}

    for names in (["plain"], ["first", "plain"], ["tracked", "guided"], list(steps), [*steps][::-1]):
        images = [ImageStep(step=steps[name], guidance=request.plan.guidance) for name in names]
        (call,) = place_calls([images], engine.contract, CPU)
        start = RunState.start(engine.contract, request.latents, request.conditioning.given)
        state = RunState.cat([replace(start, delta=torch.full((1, layers), 3.0))] * len(names))
        given = Conditioning.cat([request.conditioning] * len(names))
        counting = FunctionEngine(engine.contract.graph, measuring)
        after, _ = step(counting, call, state, given.trunk(call.rows))
        assert after.delta.tolist() == [[7.0 if counts[name] else 3.0] * layers for name in names], names


def test_a_schedule_of_other_coefficients_is_what_is_stepped_along(engine: PreciseEngine) -> None:
    """x' = a x + b prediction, whatever a and b are."""
    schedule = Schedule(timesteps=(500.0,), sigmas=(0.5,), a=(0.25,), b=(-0.75,), p=(2.0,), q=(0.5,))
    request = some_request(engine, random.Random(9), name="cfg")
    plan = make_plan(engine.contract, schedule, Guidance(name="cfg", scale=1.0))
    start = RunState.start(engine.contract, request.latents, request.conditioning.given)
    (only,) = denoise(engine, plan, start, request.conditioning)
    torch.testing.assert_close(only.latents, 0.25 * request.latents - 0.75 * only.guided)
    torch.testing.assert_close(only.clean, 2.0 * request.latents + 0.5 * only.guided)
