"""The denoising loop on a small forked model in plain PyTorch."""

from collections.abc import Generator, Mapping
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from emag_export.contract import DenoiserContract
from emag_export.engines.eager import EagerEngine
from emag_export.engines.function import FunctionEngine
from emag_export.errors import ContractError, InputError
from emag_export.kinds import KINDS, Variant
from emag_export.runtime.guidance.rules import Guidance
from emag_export.runtime.loop import Anneal, DenoiseStep, denoise
from emag_export.runtime.sampling.conditioning import Conditioning
from emag_export.runtime.sampling.plan import EmagWindows, Plan, make_plan
from emag_export.runtime.sampling.pool import StatePool
from emag_export.runtime.sampling.schedule import flow_match_schedule
from emag_export.runtime.sampling.state import RunState
from tests import sd3
from tests.conftest import small_fork

# A batched matrix product sums in another order than a single one. Measured: below 5e-6 on latents up to 30.
BATCH = 1e-4
GRID, TEXT = (3, 4), 5


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=0, atol=BATCH)


class CountingEngine(EagerEngine):
    """Remembers how often it ran and which buffers it was given."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.calls: list[tuple[int, int, int]] = []

    def run(self, feeds: Mapping[str, Tensor], out: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        results = super().run(feeds, out)
        if out is None:  # this kind of negative keeps nothing
            self.calls.append((0, 0, 0))
            return results
        self.calls.append(
            (
                feeds["ema_state"].data_ptr(),
                out["ema_state_out"].data_ptr(),
                results["ema_state_out"].data_ptr(),
            )
        )
        return results


@pytest.fixture(scope="module", params=list(Variant))
def engine(request: pytest.FixtureRequest) -> CountingEngine:
    fork = small_fork("sd3", request.param)
    return CountingEngine(fork, fork.contract.graph)


@pytest.fixture(scope="module", params=[kind for kind, facts in KINDS.items() if facts.averages])
def averaging(request: pytest.FixtureRequest) -> CountingEngine:
    fork = small_fork("sd3", request.param)
    return CountingEngine(fork, fork.contract.graph)


def contract_of(engine: EagerEngine) -> DenoiserContract:
    contract: Any = engine.module.contract
    assert isinstance(contract, DenoiserContract)
    return contract


def plan_of(engine: EagerEngine, steps: int = 8, name: str = "emag", **windows: Any) -> Plan:
    schedule = flow_match_schedule({"shift": 3.0}, steps, GRID[0] * GRID[1])
    return make_plan(contract_of(engine), schedule, Guidance(name=name), EmagWindows(**windows))


def noise(images: int) -> Tensor:
    return torch.randn(images, 4, 2 * GRID[0], 2 * GRID[1], generator=torch.Generator().manual_seed(1))


def conditioning(images: int) -> Conditioning:
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(images, *shape, generator=generator)

    return sd3.conditioning(normal(TEXT, 16), normal(8), normal(TEXT, 16), normal(8))


def steps_of(
    engine: EagerEngine, plan: Plan, latents: Tensor, given: Conditioning
) -> Generator[DenoiseStep, None, None]:
    yield from denoise(engine, plan, RunState.start(plan.contract, latents, given.given), given)


def last(engine: EagerEngine, plan: Plan, latents: Tensor, given: Conditioning) -> Tensor:
    *_, step = steps_of(engine, plan, latents, given)
    return step.latents


def test_an_image_does_not_see_its_neighbours(engine: CountingEngine) -> None:
    plan, given = plan_of(engine), conditioning(3)
    together = list(steps_of(engine, plan, noise(3), given))
    for image in range(3):
        rows = slice(image, image + 1)
        alone = list(steps_of(engine, plan, noise(3)[rows], given.select([image])))
        for one, all_of_them in zip(alone, together, strict=True):
            assert torch.equal(one.mask, all_of_them.mask[rows])
            close(one.latents, all_of_them.latents[rows])


def test_no_strength_is_cfg(engine: CountingEngine) -> None:
    guided = last(engine, plan_of(engine, strength=0.0), noise(1), conditioning(1))
    plain = last(engine, plan_of(engine, name="cfg"), noise(1), conditioning(1))
    close(guided, plain)


def test_full_strength_is_not_cfg(engine: CountingEngine) -> None:
    guided = last(engine, plan_of(engine), noise(1), conditioning(1))
    plain = last(engine, plan_of(engine, name="cfg"), noise(1), conditioning(1))
    assert (guided - plain).abs().max() > 10 * BATCH


def test_same_inputs_give_the_same_bits(engine: CountingEngine) -> None:
    first, second = (last(engine, plan_of(engine), noise(2), conditioning(2)) for _ in range(2))
    assert torch.equal(first, second)


def test_leaving_the_loop_stops_the_work(engine: CountingEngine) -> None:
    before = len(engine.calls)
    for step in steps_of(engine, plan_of(engine), noise(1), conditioning(1)):
        if step.plan.index == 2:
            break
    assert len(engine.calls) == before + 3


def test_the_two_buffers_take_turns(averaging: CountingEngine) -> None:
    before = len(averaging.calls)
    list(steps_of(averaging, plan_of(averaging), noise(1), conditioning(1)))
    calls = averaging.calls[before:]
    assert len({pointer for call in calls for pointer in call}) == 2
    for (_, _, written), (read, spare, _) in pairwise(calls):
        assert read == written != spare


def test_a_finished_step_is_not_changed_by_the_next(engine: CountingEngine) -> None:
    run = steps_of(engine, plan_of(engine), noise(1), conditioning(1))
    step = next(run)
    latents = step.latents.clone()
    list(run)
    assert torch.equal(step.latents, latents)


@pytest.mark.parametrize("name", ["cfg", "emag", "emag-only", "emag+apg", "apg"])
def test_one_step_works(engine: CountingEngine, name: str) -> None:
    assert last(engine, plan_of(engine, 1, name), noise(1), conditioning(1)).isfinite().all()


def conditioning_sent(plan: Plan, given: Conditioning, anneal: Anneal | None = None) -> list[Tensor]:
    """The text that every step of a run sends, the very tensors."""
    sent: list[Tensor] = []

    def note(feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        sent.append(feeds[sd3.EMBEDS])
        return {}

    start = RunState.start(plan.contract, noise(1), given.given)
    list(denoise(FunctionEngine(plan.contract.graph, note), plan, start, given, anneal=anneal))
    return sent


def test_conditioning_is_joined_once_as_long_as_nothing_changes(averaging: CountingEngine) -> None:
    """At one address, so that CUDA graphs can be replayed; anew where unconditional rows come or go."""
    given, steps = conditioning(1), 8
    pointers = [tensor.data_ptr() for tensor in conditioning_sent(plan_of(averaging, steps), given)]
    assert len(pointers) == steps and len(set(pointers)) == 1
    schedule = flow_match_schedule({"shift": 3.0}, steps, GRID[0] * GRID[1])
    plan = make_plan(contract_of(averaging), schedule, Guidance(name="cfg", interval=(0.25, 0.75)))
    rows = [len(tensor) for tensor in conditioning_sent(plan, given)]
    assert rows == [1, 1, 2, 2, 2, 2, 1, 1]


def test_every_step_sends_what_annealing_made_of_the_conditioning(averaging: CountingEngine) -> None:
    given, asked = conditioning(1), []

    def anneal(index: int, conditioning: Conditioning) -> Conditioning:
        asked.append(index)
        assert conditioning is given, "the prompt itself, not what an earlier step made of it"
        changed = {**given.given, sd3.EMBEDS: given.given[sd3.EMBEDS] * (index + 1)}
        return Conditioning(given=changed, negative=given.negative)

    sent = conditioning_sent(plan_of(averaging), given, anneal)
    assert asked == list(range(8))
    for index, tensor in enumerate(sent):
        assert torch.equal(tensor[-1:], given.given[sd3.EMBEDS] * (index + 1))


def test_a_missing_negative_prompt_is_named(engine: CountingEngine) -> None:
    given = sd3.conditioning(torch.zeros(1, TEXT, 16), torch.zeros(1, 8))
    with pytest.raises(InputError, match="give a negative conditioning"):
        last(engine, plan_of(engine), noise(1), given)
    assert last(engine, plan_of(engine, name="emag-only"), noise(1), given).isfinite().all()
    with pytest.raises(InputError, match="give the same tensors in both"):
        Conditioning(given=given.given, negative={sd3.EMBEDS: torch.zeros(1, TEXT, 16)})


def test_a_lent_state_is_at_the_same_addresses_in_every_run(averaging: CountingEngine) -> None:
    """So that CUDA graphs, which bake addresses, can be replayed in the next run."""
    pool, plan, latents, given = StatePool(), plan_of(averaging), noise(2), conditioning(2)
    runs, finished = [], []
    for _ in range(3):
        before = len(averaging.calls)
        with pool.lend(plan.contract, latents, given.given) as start:
            *_, step = denoise(averaging, plan, start, given)
            finished.append(step.latents)
        runs.append(averaging.calls[before:])
    assert runs[0] == runs[1] == runs[2]
    assert torch.equal(finished[0], last(averaging, plan, latents, given)), "it began with zeros"
    assert torch.equal(finished[0], finished[2]), "what the run before left made a difference"


def test_a_lent_state_begins_with_zeros_whatever_was_left(engine: CountingEngine) -> None:
    pool, contract, latents, given = StatePool(), contract_of(engine), noise(1), conditioning(1).given
    with torch.inference_mode(), pool.lend(contract, latents, given) as state:
        pointer = state.average.data_ptr()
        state.average.fill_(torch.nan)
        state.spare.fill_(torch.nan)
    with pool.lend(contract, latents, given) as state:
        assert state.average.data_ptr() == pointer
        assert not state.average.any() and not state.delta.any() and not state.momentum.any()


def test_no_pair_is_lent_twice_at_once_and_few_are_kept(averaging: CountingEngine) -> None:
    pool, contract, latents, given = StatePool(), contract_of(averaging), noise(1), conditioning(1).given
    with ExitStack() as stack:
        states = [stack.enter_context(pool.lend(contract, latents, given)) for _ in range(4)]
        buffers = [tensor.data_ptr() for state in states for tensor in (state.average, state.spare)]
        assert len(set(buffers)) == 8
        with pool.lend(contract, noise(2), conditioning(2).given) as other:
            assert other.average.shape[0] == 2
    assert len(pool._idle) == 2
    pool.clear()
    assert not pool._idle


def test_a_pool_that_shall_keep_nothing_frees_what_comes_back(averaging: CountingEngine) -> None:
    pool, contract, latents, given = StatePool(0), contract_of(averaging), noise(1), conditioning(1).given
    with pool.lend(contract, latents, given):
        assert not pool._idle
    assert not pool._idle


def test_a_generator_that_is_left_gives_its_state_back(engine: CountingEngine) -> None:
    pool, plan, latents, given = StatePool(), plan_of(engine), noise(1), conditioning(1)

    def run() -> Generator[DenoiseStep, None, None]:
        with pool.lend(plan.contract, latents, given.given) as start:
            yield from denoise(engine, plan, start, given)

    steps = run()
    next(steps)
    assert not pool._idle
    steps.close()
    assert len(pool._idle) == 1


def test_a_state_of_other_sizes_is_refused(averaging: CountingEngine) -> None:
    plan, latents, given = plan_of(averaging), noise(2), conditioning(2)
    wide, narrow = (RunState.start(plan.contract, x, given.given) for x in (latents, latents[..., :-2]))
    mixed = RunState(
        latents=wide.latents,
        average=narrow.average,
        spare=narrow.spare,
        delta=wide.delta,
        momentum=wide.momentum,
    )
    with pytest.raises(ContractError, match="ema_state has size"):
        next(denoise(averaging, plan, mixed, given))
