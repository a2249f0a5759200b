"""The denoising loop on a small forked model in plain PyTorch."""

from collections.abc import Generator, Mapping
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from emag_export.contract import Variant
from emag_export.engines.eager import EagerEngine
from emag_export.errors import ContractError, InputError
from emag_export.runtime.guidance.rules import Guidance
from emag_export.runtime.loop import Conditioning, DenoiseStep, ImageStep, call_engine, denoise
from emag_export.runtime.sampling.plan import EmagWindows, Phase, Plan, make_plan
from emag_export.runtime.sampling.rows import lay_out_rows, place_rows
from emag_export.runtime.sampling.schedule import flow_match_schedule
from emag_export.runtime.sampling.state import EmaState, StatePool
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
        assert out is not None
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


def plan_of(engine: EagerEngine, steps: int = 8, name: str = "emag", **windows: Any) -> Plan:
    schedule = flow_match_schedule({"shift": 3.0}, steps, GRID[0] * GRID[1])
    contract: Any = engine.module.contract
    return make_plan(contract, schedule, Guidance(name=name), EmagWindows(**windows))


def noise(images: int) -> Tensor:
    return torch.randn(images, 4, 2 * GRID[0], 2 * GRID[1], generator=torch.Generator().manual_seed(1))


def conditioning(images: int) -> Conditioning:
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(images, *shape, generator=generator)

    return Conditioning(
        embeds=normal(TEXT, 16), pooled=normal(8), negative_embeds=normal(TEXT, 16), negative_pooled=normal(8)
    )


def only(given: Conditioning, rows: slice) -> Conditioning:
    assert given.negative_embeds is not None and given.negative_pooled is not None
    return Conditioning(
        embeds=given.embeds[rows],
        pooled=given.pooled[rows],
        negative_embeds=given.negative_embeds[rows],
        negative_pooled=given.negative_pooled[rows],
    )


def last(engine: EagerEngine, plan: Plan, latents: Tensor, given: Conditioning) -> Tensor:
    *_, step = denoise(engine, plan, latents, given)
    return step.latents


def test_an_image_does_not_see_its_neighbours(engine: CountingEngine) -> None:
    plan, given = plan_of(engine), conditioning(3)
    together = list(denoise(engine, plan, noise(3), given))
    for image in range(3):
        rows = slice(image, image + 1)
        alone = list(denoise(engine, plan, noise(3)[rows], only(given, rows)))
        for one, all_of_them in zip(alone, together, strict=True):
            assert torch.equal(one.mask, all_of_them.mask[rows])
            close(one.latents, all_of_them.latents[rows])


def test_images_in_different_phases_share_one_call(engine: CountingEngine) -> None:
    plan, given, latents = plan_of(engine, 28), conditioning(3), noise(3)
    chosen = {phase: next(step for step in plan.steps[1:] if step.phase is phase) for phase in Phase}
    steps = [ImageStep.of(chosen[phase]) for phase in Phase]
    mask = torch.zeros(3, 2)
    mask[list(Phase).index(Phase.GUIDE), 1] = 1.0

    def start(images: slice) -> EmaState:
        contract: Any = engine.module.contract
        zeros = EmaState.zeros(contract, images=3, grid=GRID, text=TEXT, device=torch.device("cpu"))
        values = torch.rand(zeros.average.shape, generator=torch.Generator().manual_seed(3)) * 0.1
        return EmaState(
            average=values[images], spare=torch.zeros_like(values[images]), delta=zeros.delta[images]
        )

    before = len(engine.calls)
    shared, state = call_engine(engine, steps, latents, given, start(slice(3)), mask=mask, uncond=True)
    assert len(engine.calls) == before + 1
    for image, step in enumerate(steps):
        rows = slice(image, image + 1)
        alone, own = call_engine(
            engine, [step], latents[rows], only(given, rows), start(rows), mask=mask[rows], uncond=True
        )
        assert shared.uncond is not None and alone.uncond is not None
        close(shared.uncond[rows], alone.uncond)
        close(shared.cond[rows], alone.cond)
        close(shared.perturbed[rows], alone.perturbed)
        close(state.average[rows], own.average)
        close(state.delta[rows], own.delta)
        assert torch.equal(alone.cond, alone.perturbed) == (step.phase != Phase.GUIDE)


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
    for step in denoise(engine, plan_of(engine), noise(1), conditioning(1)):
        if step.plan.index == 2:
            break
    assert len(engine.calls) == before + 3


def test_the_two_buffers_take_turns(engine: CountingEngine) -> None:
    before = len(engine.calls)
    list(denoise(engine, plan_of(engine), noise(1), conditioning(1)))
    calls = engine.calls[before:]
    assert len({pointer for call in calls for pointer in call}) == 2
    for (_, _, written), (read, spare, _) in pairwise(calls):
        assert read == written != spare


def test_a_finished_step_is_not_changed_by_the_next(engine: CountingEngine) -> None:
    run = denoise(engine, plan_of(engine), noise(1), conditioning(1))
    step = next(run)
    latents = step.latents.clone()
    list(run)
    assert torch.equal(step.latents, latents)


@pytest.mark.parametrize("name", ["cfg", "emag", "emag-only", "emag+apg", "apg"])
def test_one_step_works(engine: CountingEngine, name: str) -> None:
    assert last(engine, plan_of(engine, 1, name), noise(1), conditioning(1)).isfinite().all()


def test_a_missing_negative_prompt_is_named(engine: CountingEngine) -> None:
    given = Conditioning(embeds=torch.zeros(1, TEXT, 16), pooled=torch.zeros(1, 8))
    with pytest.raises(InputError, match="give negative embeddings"):
        last(engine, plan_of(engine), noise(1), given)
    assert last(engine, plan_of(engine, name="emag-only"), noise(1), given).isfinite().all()
    with pytest.raises(InputError, match="give both or neither"):
        Conditioning(
            embeds=torch.zeros(1, TEXT, 16),
            pooled=torch.zeros(1, 8),
            negative_embeds=torch.zeros(1, TEXT, 16),
        )


def test_a_lent_state_is_at_the_same_addresses_in_every_run(engine: CountingEngine) -> None:
    """So that CUDA graphs, which bake addresses, can be replayed in the next run."""
    pool, plan, latents, given = StatePool(), plan_of(engine), noise(2), conditioning(2)
    runs, finished = [], []
    for _ in range(3):
        before = len(engine.calls)
        with pool.lend(plan.contract, latents, given.embeds) as state:
            *_, step = denoise(engine, plan, latents, given, state=state)
            finished.append(step.latents)
        runs.append(engine.calls[before:])
    assert runs[0] == runs[1] == runs[2]
    assert torch.equal(finished[0], last(engine, plan, latents, given)), "it began with zeros"
    assert torch.equal(finished[0], finished[2]), "what the run before left made a difference"


def test_a_lent_state_begins_with_zeros_whatever_was_left(engine: CountingEngine) -> None:
    pool, contract, latents, embeds = StatePool(), plan_of(engine).contract, noise(1), conditioning(1).embeds
    with torch.inference_mode(), pool.lend(contract, latents, embeds) as state:
        pointer = state.average.data_ptr()
        state.average.fill_(torch.nan)
        state.spare.fill_(torch.nan)
    with pool.lend(contract, latents, embeds) as state:
        assert state.average.data_ptr() == pointer
        assert not state.average.any() and not state.delta.any()


def test_no_pair_is_lent_twice_at_once_and_few_are_kept(engine: CountingEngine) -> None:
    pool, contract, latents, embeds = StatePool(2), plan_of(engine).contract, noise(1), conditioning(1).embeds
    with ExitStack() as stack:
        states = [stack.enter_context(pool.lend(contract, latents, embeds)) for _ in range(4)]
        buffers = [tensor.data_ptr() for state in states for tensor in (state.average, state.spare)]
        assert len(set(buffers)) == 8
        with pool.lend(contract, noise(2), conditioning(2).embeds) as other:
            assert other.average.shape[0] == 2
    assert len(pool._idle) == 2
    pool.clear()
    assert not pool._idle


def test_a_generator_that_is_left_gives_its_state_back(engine: CountingEngine) -> None:
    pool, plan, latents, given = StatePool(), plan_of(engine), noise(1), conditioning(1)

    def run() -> Generator[DenoiseStep, None, None]:
        with pool.lend(plan.contract, latents, given.embeds) as state:
            yield from denoise(engine, plan, latents, given, state=state)

    steps = run()
    next(steps)
    assert not pool._idle
    steps.close()
    assert len(pool._idle) == 1


def test_a_state_of_other_sizes_is_refused(engine: CountingEngine) -> None:
    plan, latents, given = plan_of(engine), noise(2), conditioning(2)
    state = EmaState.zeros_for(plan.contract, latents[..., :-2], given.embeds)
    with pytest.raises(ContractError, match="ema_state has size"):
        next(denoise(engine, plan, latents, given, state=state))


def test_predictions_are_views_unless_rows_are_scattered() -> None:
    """Index tensors would have to be on the device; slices need nothing."""
    cpu = torch.device("cpu")
    velocity = torch.arange(6.0).reshape(6, 1, 1, 1)
    guided = place_rows((Phase.GUIDE, Phase.GUIDE), True, cpu)
    parts = [part for part in guided.split(velocity) if part is not None]
    assert [part.flatten().tolist() for part in parts] == [[0, 1], [2, 3], [4, 5]]
    assert all(part.untyped_storage().data_ptr() == velocity.untyped_storage().data_ptr() for part in parts)
    mixed = place_rows((Phase.GUIDE, Phase.TRACK), True, cpu)
    assert isinstance(mixed.cond, Tensor) and mixed.cond.tolist() == list(
        lay_out_rows([Phase.GUIDE, Phase.TRACK], True).cond
    )
    assert place_rows((Phase.GUIDE, Phase.TRACK), True, cpu) is mixed
