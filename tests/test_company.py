"""Whoever comes, goes or fails between calls, an image gets the latents that it has alone."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from emag_export.engines.observed import ObservedEngine
from emag_export.errors import CancelledError, DeadlineError, EngineError
from emag_export.kinds import Variant
from emag_export.runtime.batching.banks import Room
from emag_export.runtime.batching.job import Admitted, Failed, Finished, Job, JobEvent, Stepped, Urgency
from emag_export.runtime.batching.policy import policy_of
from emag_export.runtime.batching.scheduler import Call, StepScheduler
from tests.scheduling import expected, precise, prepared

# Relative to the largest. Measured on this float64 model: no difference at all.
ALIKE = 1e-5
POOL = 24


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
TestCompany = pytest.mark.slow(Company.TestCase)
TestCompany.settings = _SETTINGS
TestCompanyOfMaps = pytest.mark.slow(CompanyOfMaps.TestCase)
TestCompanyOfMaps.settings = settings(_SETTINGS, max_examples=8)
