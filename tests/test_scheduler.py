"""The step scheduler: who is admitted when, and what becomes of those that leave or fail."""

import random
from collections.abc import Mapping
from typing import Any

import pytest
from torch import Tensor

from emag_export.engines.function import FunctionEngine
from emag_export.errors import ContractError, EngineError, InputError
from emag_export.kinds import Variant
from emag_export.runtime.batching.banks import Room
from emag_export.runtime.batching.job import Job, JobEvent, Urgency
from emag_export.runtime.batching.policy import by_priority, earliest_deadline, oldest_first, policy_of
from emag_export.runtime.batching.scheduler import StepScheduler
from emag_export.runtime.batching.slots import Slots
from emag_export.runtime.prepare import Prepared
from tests.mixtures import job_of, prepared_request, some_request
from tests.scheduling import precise, prepared


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
