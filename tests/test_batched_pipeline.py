"""Many pictures at once: the same as alone, bounded, cancellable, and whole after an engine has failed."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from emag_export.bundle import DENOISER, Bundle
from emag_export.engines.observed import ObservedEngine
from emag_export.engines.protocol import Engine
from emag_export.errors import (
    CancelledError,
    DeadlineError,
    EmagError,
    EngineError,
    InputError,
    QueueFullError,
    UnavailableError,
)
from emag_export.runtime.batching.banks import Room
from emag_export.runtime.batching.call_times import CallTime, CallTimes
from emag_export.runtime.batching.options import BatchingOptions, Sizing
from emag_export.runtime.batching.pipeline import BatchedPipeline
from emag_export.runtime.batching.ticket import Drawn, Ended, Progressed, Status, Ticket
from emag_export.runtime.keywords import amended
from emag_export.runtime.pictures.metadata import Picture
from emag_export.runtime.pipeline import Pipeline
from emag_export.runtime.request import GenerationRequest, default_request
from emag_export.runtime.sampling.plan import Phase
from tests.bundles import opener

PROMPTS = ("a large red circle on a blue background", "a small green star on a white background")
# Of 255. A larger call adds up in another order; measured on this model: no pixel differs.
ONE_LEVEL = 1


class Workshop:
    """A pipeline on tiny-sd3 whose engine can be held up, and broken."""

    def __init__(self, bundle: Path) -> None:
        self.go = threading.Event()
        self.go.set()
        self.breaks = 0
        """Calls that will fail."""
        self.opens = 0
        self.refusals = 0
        """Openings that will fail."""
        self.sizes: list[int] = []
        open_engine = opener(threads=1)

        def open_watched(opened: Bundle, component: str) -> Engine:
            if component != DENOISER:
                return open_engine(opened, component)
            self.opens += 1
            if self.refusals:
                self.refusals -= 1
                raise EngineError("no device answers")
            return ObservedEngine(open_engine(opened, component), before=self.before)

        self.pipeline = Pipeline(Bundle(bundle), open_watched)

    def before(self, feeds: Mapping[str, Tensor]) -> None:
        assert self.go.wait(30)
        self.sizes.append(feeds["ema_step"].shape[0])
        if self.breaks:
            self.breaks -= 1
            raise RuntimeError("an illegal memory access was encountered in /usr/lib/libcuda.so")

    def request(self, seed: int = 0, prompt: str = PROMPTS[0], **keywords: Any) -> GenerationRequest:
        base = default_request(self.pipeline.bundle, prompt)
        return amended(base, {"seed": seed, "steps": 4, **keywords})  # type: ignore[typeddict-item]

    def start(self, *, per_call: int = 4, live: int = 4, **options: Any) -> BatchedPipeline:
        return BatchedPipeline(self.pipeline, BatchingOptions(**options), sizing=sizing(per_call, live))


def sizing(per_call: int, live: int) -> Sizing:
    rows = tuple(CallTime(images=1, phase=phase, seconds=0.01) for phase in (Phase.PLAIN, Phase.GUIDE))
    table = CallTimes(bundle="", engine="", machine="", threads=1, height=64, width=64, times=rows)
    return Sizing(
        room=Room(per_call=per_call, live=live), seconds_per_step=0.01, call_times=table, kept=False
    )


@pytest.fixture
def workshop(tiny_bundle: Path) -> Workshop:
    return Workshop(tiny_bundle)


@pytest.fixture
def batched(workshop: Workshop) -> Iterator[BatchedPipeline]:
    with workshop.start() as running:
        yield running
        workshop.go.set()


def wait_for(condition: Callable[[], object], what: str) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError(f"{what} did not come to pass in 12 seconds")


def test_pictures_are_those_of_a_pipeline_alone(workshop: Workshop, batched: BatchedPipeline) -> None:
    """Of different steps, guidance, prompts and seeds; the record in each is that of its own request."""
    requests = [
        workshop.request(
            seed=seed,
            prompt=PROMPTS[seed % 2],
            steps=(3, 6, 9)[seed % 3],
            guidance=("emag", "cfg", "emag-only", "emag+cads", "emag+apg")[seed % 5],
        )
        for seed in range(8)
    ]
    together = [ticket.result(60) for ticket in batched.submit(requests)]
    assert max(workshop.sizes) == 4, "they shared calls"
    with Pipeline.open(workshop.pipeline.bundle, threads=1) as plain:
        for request, picture in zip(requests, together, strict=True):
            prepared = plain.prepare([request])
            *_, last = plain.denoise(prepared)
            (wanted,) = plain.decode(last.latents)
            assert np.abs(np.asarray(picture).astype(int) - wanted.astype(int)).max() <= ONE_LEVEL
            assert isinstance(picture, Picture) and picture.info["Description"] == request.prompt


def test_a_listener_hears_every_step_and_the_end(workshop: Workshop, batched: BatchedPipeline) -> None:
    heard: list[Any] = []
    (ticket,) = batched.submit(
        [workshop.request()], listener=lambda ticket, event: heard.append(event), shown=frozenset({1, 3})
    )
    picture = ticket.result(60)
    wait_for(lambda: isinstance(heard[-1], Drawn), "the end")
    steps = [event for event in heard if isinstance(event, Progressed)]
    assert sorted(step.index for step in steps) == [0, 1, 2, 3] and steps[0].steps == 4
    previews = {step.index: step.preview for step in steps}
    assert previews[0] is None and previews[1] is not None and previews[1].size == picture.size
    assert isinstance(heard[-1], Drawn) and heard[-1].picture is picture
    assert ticket.status == Status.COMPLETED and ticket.index == 4
    order = [ticket.times[name] for name in ("arrived", "admitted", "previewed", "decoding", "ended")]
    assert order == sorted(order)


def test_a_full_queue_refuses_all_of_a_request_and_says_when_to_come(workshop: Workshop) -> None:
    with workshop.start(per_call=1, live=1, queue_images=2) as batched:
        workshop.go.clear()
        first = batched.submit([workshop.request(seed=seed) for seed in range(3)])
        wait_for(lambda: batched.live == 1, "a live image")
        with pytest.raises(QueueFullError, match="2 may wait") as refused:
            batched.submit([workshop.request(seed=9)])
        assert 1 <= refused.value.retry_after <= 120
        first[2].cancel()
        wait_for(lambda: batched.waiting == 1, "a place in the queue")
        with pytest.raises(QueueFullError, match="2 more were asked for"):
            batched.submit([workshop.request(seed=9), workshop.request(seed=10)])
        (later,) = batched.submit([workshop.request(seed=9)])
        workshop.go.set()
        assert later.result(60).size == (64, 64)
        with pytest.raises(CancelledError):
            first[2].result(60)
        assert first[2].status == Status.CANCELLED


def test_the_wait_that_is_announced_grows_with_what_waits(workshop: Workshop) -> None:
    with workshop.start(per_call=1, live=1) as batched:
        workshop.go.clear()
        tickets = batched.submit([workshop.request(seed=seed, steps=28) for seed in range(6)])
        # Six runs of 28 steps of at least 10 ms: 0.28 s a picture that leaves.
        assert batched.retry_after(1) < batched.retry_after(20) <= 120
        for ticket in tickets:
            ticket.cancel()
        workshop.go.set()


def test_what_is_too_late_is_given_up(workshop: Workshop) -> None:
    with workshop.start(per_call=1, live=1) as batched:
        workshop.go.clear()
        batched.submit([workshop.request()])
        wait_for(lambda: batched.live == 1, "a live image")
        (late,) = batched.submit([workshop.request(seed=1)], seconds=0.05)
        time.sleep(0.1)
        workshop.go.set()
        with pytest.raises(DeadlineError, match="allow more time"):
            late.result(60)
        assert late.status == Status.FAILED


def test_a_cancelled_picture_frees_its_row_at_the_next_step(
    workshop: Workshop, batched: BatchedPipeline
) -> None:
    steps: list[int] = []

    def leave(ticket: Ticket, event: object) -> None:
        if isinstance(event, Progressed):
            steps.append(event.index)
            if event.index == 2:
                ticket.cancel()

    (ticket,) = batched.submit([workshop.request(steps=28)], listener=leave)
    with pytest.raises(CancelledError, match="as was asked for"):
        ticket.result(60)
    assert steps == [0, 1, 2]


def test_an_engine_that_fails_harms_one_call_and_is_opened_again(workshop: Workshop) -> None:
    with workshop.start(per_call=1, live=2) as batched:
        workshop.go.clear()
        tickets = batched.submit([workshop.request(seed=seed) for seed in range(4)])
        wait_for(lambda: batched.live, "a live image")
        workshop.breaks = 1
        workshop.go.set()
        outcomes = [outcome(ticket) for ticket in tickets]
    assert [isinstance(found, EngineError) for found in outcomes].count(True) == 1
    assert [isinstance(found, Picture) for found in outcomes].count(True) == 3
    assert workshop.opens == 2


def outcome(ticket: Ticket) -> Picture | EmagError:
    try:
        return ticket.result(60)
    except EmagError as error:
        return error


def test_nothing_is_taken_while_the_engine_cannot_be_opened(
    workshop: Workshop, batched: BatchedPipeline
) -> None:
    workshop.refusals, workshop.breaks = 1, 1
    (broken,) = batched.submit([workshop.request()])
    assert isinstance(outcome(broken), EngineError)
    wait_for(lambda: batched.not_ready, "the failure")
    with pytest.raises(UnavailableError, match="opened again"):
        batched.submit([workshop.request()])
    wait_for(lambda: batched.not_ready is None, "the engine's return")
    assert isinstance(outcome(*batched.submit([workshop.request()])), Picture)


def test_a_loop_that_stands_still_is_noticed(workshop: Workshop) -> None:
    with workshop.start(stall_seconds=0.2) as batched:
        workshop.go.clear()
        (ticket,) = batched.submit([workshop.request()])
        wait_for(lambda: batched.not_ready, "the stall")
        assert "no step was finished for" in str(batched.not_ready)
        workshop.go.set()
        assert isinstance(outcome(ticket), Picture)
        assert batched.not_ready is None


def test_draining_finishes_what_is_there_and_takes_nothing_new(workshop: Workshop) -> None:
    with workshop.start() as batched:
        workshop.go.clear()
        tickets = batched.submit([workshop.request(seed=seed) for seed in range(3)])
        assert not batched.drain(0.05)
        with pytest.raises(UnavailableError, match="draining"):
            batched.submit([workshop.request()])
        workshop.go.set()
        assert batched.drain(60) and batched.unfinished == 0
        assert all(ticket.status == Status.COMPLETED for ticket in tickets)


def test_closing_answers_everybody(workshop: Workshop) -> None:
    batched = workshop.start(per_call=1, live=1)
    tickets = batched.submit([workshop.request(seed=seed, steps=28) for seed in range(4)])
    batched.close()
    for ticket in tickets:
        assert isinstance(outcome(ticket), UnavailableError), "nobody waits for ever"


def test_a_picture_that_cannot_be_decoded_fails_alone(
    workshop: Workshop, batched: BatchedPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, failures = workshop.pipeline.decode, iter([True])

    def once(latents: Tensor) -> Any:
        if next(failures, False):
            raise MemoryError("no memory for the VAE")
        return decode(latents)

    monkeypatch.setattr(workshop.pipeline, "decode", once)
    outcomes = [outcome(t) for t in batched.submit([workshop.request(seed=seed) for seed in range(2)])]
    assert sorted(type(found).__name__ for found in outcomes) == ["EngineError", "Picture"]


def test_a_prompt_that_cannot_be_encoded_fails_alone(
    workshop: Workshop, batched: BatchedPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = workshop.pipeline.prepare

    def picky(requests: Any) -> Any:
        if requests[0].seed == 1:
            raise RuntimeError("the tokenizer is gone")
        return prepare(requests)

    monkeypatch.setattr(workshop.pipeline, "prepare", picky)
    outcomes = [outcome(t) for t in batched.submit([workshop.request(seed=seed) for seed in range(2)])]
    assert [type(found).__name__ for found in outcomes] == ["Picture", "EngineError"]


def test_what_does_not_fit_is_refused_at_once(workshop: Workshop, batched: BatchedPipeline) -> None:
    fine = workshop.request()
    with pytest.raises(InputError, match="multiple of"):
        batched.submit([fine, replace(fine, height=65)])
    assert batched.unfinished == 0, "all of a request are taken, or none"
    with pytest.raises(InputError, match="`live_images` is 0"):
        BatchingOptions(live_images=0)
    with pytest.raises(InputError, match="`policy` 'fair'"):
        BatchingOptions(policy="fair")


def test_a_listener_that_raises_gives_up_its_own_picture(
    workshop: Workshop, batched: BatchedPipeline
) -> None:
    def broken(ticket: Ticket, event: object) -> None:
        if isinstance(event, Progressed):
            raise ValueError("somebody else's mistake")
        assert isinstance(event, Ended)

    (bad,) = batched.submit([workshop.request()], listener=broken)
    (good,) = batched.submit([workshop.request(seed=1)])
    assert isinstance(outcome(bad), CancelledError) and isinstance(outcome(good), Picture)
