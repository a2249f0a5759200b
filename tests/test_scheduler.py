"""The step scheduler: whoever comes, goes or fails, an image gets the latents that it has alone."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from emag_export.engines.function import FunctionEngine
from emag_export.engines.observed import ObservedEngine
from emag_export.errors import CancelledError, ContractError, DeadlineError, EngineError, InputError
from emag_export.kinds import Variant
from emag_export.runtime.batching.banks import Room
from emag_export.runtime.batching.job import Admitted, Failed, Finished, Job, JobEvent, Stepped, Urgency
from emag_export.runtime.batching.policy import by_priority, earliest_deadline, oldest_first, policy_of
from emag_export.runtime.batching.scheduler import Call, StepScheduler
from emag_export.runtime.batching.slots import Slots
from emag_export.runtime.prepare import Prepared
from tests.mixtures import PreciseEngine, alone, job_of, noisy, prepared_request, some_request

# Relative to the largest. Measured on this float64 model: no difference at all.
ALIKE = 1e-5
POOL = 24
GRIDS = ((3, 4), (2, 3))


@cache
def precise(variant: Variant) -> PreciseEngine:
    return PreciseEngine(variant)


@cache
def request_of(variant: Variant, number: int) -> Any:
    """One of a few dozen requests of two sizes, every third with a sampler that adds noise."""
    grid = GRIDS[number % 2]
    request = some_request(precise(variant), random.Random(number), grid=grid)
    return noisy(request) if number % 3 == 0 else request


def prepared(variant: Variant, number: int) -> Prepared:
    return prepared_request(request_of(variant, number), seed=number)


@cache
def expected(variant: Variant, number: int) -> Tensor:
    return alone(precise(variant), prepared(variant, number))


@dataclass(eq=False)
class Asked:
    """A request in the machine, and what was heard of it."""

    number: int
    job: Job
    events: list[JobEvent] = field(default_factory=list)

    @property
    def end(self) -> JobEvent | None:
        return next((event for event in self.events if isinstance(event, Finished | Failed)), None)


class Company(RuleBasedStateMachine):
    """Arrivals, cancellations, deadlines and engine failures in any order between calls."""

    variant = Variant.EMAG_Q

    @initialize(
        per_call=st.integers(1, 4), more=st.integers(0, 4), policy=st.sampled_from(["fifo", "priority"])
    )
    def begin(self, per_call: int, more: int, policy: str) -> None:
        self.now = 0.0
        self.failing = False
        self.asked: list[Asked] = []
        self.calls: list[Call] = []
        engine = ObservedEngine(precise(self.variant), before=self.may_fail)
        self.scheduler = StepScheduler(
            engine.engine.contract,  # type: ignore[attr-defined]
            engine,
            room=Room(per_call=per_call, live=per_call + more),
            policy=policy_of(policy),
            observe=self.calls.append,
            clock=lambda: self.now,
        )

    def may_fail(self, feeds: Mapping[str, Tensor]) -> None:
        if self.failing:
            self.failing = False
            raise RuntimeError("the GPU has fallen off the bus")

    @rule(number=st.integers(0, POOL - 1), priority=st.integers(0, 2), seconds=st.none() | st.integers(1, 30))
    def arrive(self, number: int, priority: int, seconds: int | None) -> None:
        one = prepared(self.variant, number)
        shown = frozenset({0, len(one.plan.steps) - 1})
        deadline = None if seconds is None else self.now + seconds
        urgency = Urgency(arrived=self.now, number=len(self.asked), priority=priority, deadline=deadline)
        asked = Asked(number=number, job=None)  # type: ignore[arg-type]
        asked.job = Job(prepared=one, listener=asked.events.append, urgency=urgency, shown=shown)
        self.asked.append(asked)
        self.scheduler.submit(asked.job)

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.asked)).job.cancel()

    @rule(seconds=st.floats(0.1, 5))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(calls=st.integers(1, 5))
    def work(self, calls: int) -> None:
        for _ in range(calls):
            self.scheduler.tick()

    @precondition(lambda self: self.scheduler.live)
    @rule()
    def break_down(self) -> None:
        """In the next call, if those who were live have not all left before it."""
        self.failing = True
        try:
            while self.failing and self.scheduler.tick():
                pass
        except EngineError as error:
            assert "fallen off the bus" in str(error)
        self.failing = False

    @invariant()
    def room_is_kept(self) -> None:
        if hasattr(self, "scheduler"):
            assert self.scheduler.live <= self.scheduler.room.live
            assert all(call.images <= self.scheduler.room.per_call for call in self.calls)

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        while self.scheduler.tick():
            pass
        assert (self.scheduler.live, self.scheduler.waiting, self.scheduler.remaining_steps()) == (0, 0, 0)
        for asked in self.asked:
            self.check(asked)

    def check(self, asked: Asked) -> None:
        kinds = [type(event) for event in asked.events]
        assert kinds.count(Finished) + kinds.count(Failed) == 1, "one end, and nothing after it"
        assert kinds[-1] in (Finished, Failed)
        steps = [event for event in asked.events if isinstance(event, Stepped)]
        assert [step.index for step in steps] == list(range(len(steps)))
        if isinstance(end := asked.end, Failed):
            assert isinstance(end.error, CancelledError | DeadlineError | EngineError)
            assert not isinstance(end.error, CancelledError) or asked.job.cancelled
            return
        assert isinstance(end, Finished) and kinds[0] is Admitted
        assert len(steps) == asked.job.steps
        wanted = expected(self.variant, asked.number)
        assert float((end.latents - wanted).abs().max() / wanted.abs().max()) <= ALIKE
        assert [step.index for step in steps if step.clean is not None] == sorted(asked.job.shown)
        # x0 of the last step of a flow is the finished image.
        if asked.number % 3:
            torch.testing.assert_close(steps[-1].clean, end.latents, rtol=1e-4, atol=1e-4)


class CompanyOfMaps(Company):
    """The same with whole attention maps as state."""

    variant = Variant.EMAG


_SETTINGS = settings(
    max_examples=20, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)
TestCompany = Company.TestCase
TestCompany.settings = _SETTINGS
TestCompanyOfMaps = CompanyOfMaps.TestCase
TestCompanyOfMaps.settings = settings(_SETTINGS, max_examples=8)


def quiet_scheduler(engine: Any = None, *, per_call: int = 2, live: int = 2, **options: Any) -> StepScheduler:
    """On an engine that computes nothing."""
    contract = precise(Variant.EMAG_Q).contract
    return StepScheduler(
        contract,
        engine or FunctionEngine(contract.graph),
        room=Room(per_call=per_call, live=live),
        **options,
    )


def waiting_job(log: list[Any], name: str, **urgency: Any) -> Job:
    return job_of(
        prepared(Variant.EMAG_Q, 2), lambda event: log.append((name, type(event).__name__)), **urgency
    )


def test_whoever_arrives_is_in_the_next_call() -> None:
    sizes: list[int] = []
    scheduler = quiet_scheduler(observe=lambda call: sizes.append(call.images))
    log: list[Any] = []
    scheduler.submit(waiting_job(log, "first"))
    scheduler.tick()
    scheduler.submit(waiting_job(log, "second"))
    scheduler.tick()
    assert sizes == [1, 2]


def test_a_cancelled_image_is_in_no_further_call() -> None:
    sizes: list[int] = []
    scheduler = quiet_scheduler(observe=lambda call: sizes.append(call.images))
    log: list[Any] = []
    jobs = [waiting_job(log, name) for name in ("stays", "leaves")]
    for job in jobs:
        scheduler.submit(job)
    scheduler.tick()
    jobs[1].cancel()
    scheduler.tick()
    assert sizes == [2, 1] and log[-2:] == [("leaves", "Failed"), ("stays", "Stepped")]


@pytest.mark.parametrize(
    ("policy", "order"),
    [
        (oldest_first, ["old", "urgent", "soon"]),
        (by_priority, ["urgent", "old", "soon"]),
        (earliest_deadline, ["soon", "old", "urgent"]),
    ],
)
def test_a_policy_says_who_is_admitted_first(policy: Any, order: list[str]) -> None:
    log: list[Any] = []
    scheduler = quiet_scheduler(per_call=1, live=1, policy=policy, clock=lambda: 0.0)
    for job in (
        waiting_job(log, "soon", arrived=3.0, number=3, deadline=60.0),
        waiting_job(log, "urgent", arrived=2.0, number=2, priority=1),
        waiting_job(log, "old", arrived=1.0, number=1),
    ):
        scheduler.submit(job)
    while scheduler.tick():
        pass
    assert [name for name, event in log if event == "Admitted"] == order


def test_nobody_waits_for_ever_behind_priorities() -> None:
    """Whoever arrived long ago comes before any priority that arrives now."""
    patient = Urgency(arrived=0.0)
    assert by_priority(patient) < by_priority(Urgency(arrived=21.0, priority=2))
    assert by_priority(patient) > by_priority(Urgency(arrived=19.0, priority=2))


def test_live_images_beyond_a_call_take_turns() -> None:
    """A short run that arrives behind a long one does not wait for its end."""
    log: list[Any] = []
    scheduler = quiet_scheduler(per_call=1, live=2)
    for name in ("a", "b"):
        scheduler.submit(waiting_job(log, name))
    for _ in range(4):
        scheduler.tick()
    assert [name for name, event in log if event == "Stepped"] == ["a", "b", "a", "b"]


def test_half_empty_banks_become_one() -> None:
    sizes: list[int] = []
    scheduler = quiet_scheduler(per_call=2, live=4, observe=lambda call: sizes.append(call.images))
    log: list[Any] = []
    jobs = [waiting_job(log, str(number)) for number in range(4)]
    for job in jobs:
        scheduler.submit(job)
    scheduler.tick()
    scheduler.tick()
    jobs[0].cancel()
    jobs[2].cancel()
    scheduler.tick()
    scheduler.tick()
    assert sizes == [2, 2, 2, 2]


def test_an_image_of_another_size_that_finds_no_room_is_not_overtaken() -> None:
    """Banks are as many as live images need, and one: a third size waits, and so does everybody behind it."""
    log: list[Any] = []
    scheduler = quiet_scheduler(per_call=4, live=4)
    engine = precise(Variant.EMAG_Q)

    def sized(name: str, grid: tuple[int, int], number: int) -> Job:
        request = some_request(engine, random.Random(1), name="cfg", grid=grid)
        return job_of(
            prepared_request(request, 0),
            lambda event: log.append((name, type(event).__name__)),
            number=number,
        )

    for number, (name, grid) in enumerate(
        [("small", (2, 3)), ("wide", (3, 4)), ("third", (4, 4)), ("behind", (2, 3))]
    ):
        scheduler.submit(sized(name, grid, number))
    scheduler.tick()
    assert [name for name, event in log if event == "Admitted"] == ["small", "wide"]
    while scheduler.tick():
        pass
    assert [name for name, event in log if event == "Admitted"] == ["small", "wide", "third", "behind"]


def test_a_listener_that_raises_gives_up_its_own_image_only() -> None:
    log: list[Any] = []

    def broken(event: JobEvent) -> None:
        raise ValueError("somebody else's mistake")

    scheduler = quiet_scheduler()
    scheduler.submit(job_of(prepared(Variant.EMAG_Q, 2), broken))
    scheduler.submit(waiting_job(log, "healthy", number=1))
    while scheduler.tick():
        pass
    assert log[-1] == ("healthy", "Finished")


def test_buffers_stay_where_they_are() -> None:
    """What a captured CUDA graph needs: the addresses of a call depend on its number of images alone."""
    seen: dict[int, set[int]] = {}

    def note(feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        seen.setdefault(feeds["ema_step"].shape[0], set()).add(feeds["ema_state"].data_ptr())
        return {}

    contract = precise(Variant.EMAG_Q).contract
    scheduler = quiet_scheduler(FunctionEngine(contract.graph, note), per_call=3, live=3)
    log: list[Any] = []
    for round_ in range(3):
        for number in range(3):
            scheduler.submit(waiting_job(log, f"{round_}-{number}"))
            scheduler.tick()
        while scheduler.tick():
            pass
    assert set(seen) == {1, 2, 3}
    addresses = set().union(*seen.values())
    assert len(addresses) == 2, "two buffers that take turns, the same ones for every number of images"


def test_a_bank_takes_no_more_than_it_has_places() -> None:
    one = prepared(Variant.EMAG_Q, 2)
    slots = Slots(one.plan.contract, one.latents, one.conditioning, 1)
    slots.join(one.latents, one.conditioning)
    with pytest.raises(ContractError, match="all 1 places"):
        slots.join(one.latents, one.conditioning)


def test_bad_numbers_are_refused() -> None:
    with pytest.raises(InputError, match="no fewer live ones"):
        Room(per_call=4, live=2)
    with pytest.raises(InputError, match="`policy` 'random'; choose fifo, priority, deadline"):
        policy_of("random")
    one = prepared(Variant.EMAG_Q, 2)
    with pytest.raises(InputError, match="a job is one image"):
        Job(
            prepared=Prepared(**{**vars(one), "requests": one.requests * 2}),
            listener=lambda event: None,
            urgency=Urgency(arrived=0.0),
        )


def test_everybody_is_told_when_the_end_comes() -> None:
    log: list[Any] = []
    scheduler = quiet_scheduler(per_call=1, live=1)
    for number, name in enumerate(("live", "waits")):
        scheduler.submit(waiting_job(log, name, number=number))
    scheduler.tick()
    scheduler.fail_all(EngineError("the end"))
    assert {name for name, event in log if event == "Failed"} == {"live", "waits"}
    assert not scheduler.tick()
