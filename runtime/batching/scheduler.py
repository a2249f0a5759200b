"""The step scheduler: one loop owns an engine, and images join and leave between its calls.

:meth:`StepScheduler.tick` makes one call for one bank. It has no thread of its own, so that a test can drive
it; :mod:`emag_export.runtime.batching.pipeline` runs it in one.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock

import torch

from emag_export.contract import DenoiserContract
from emag_export.engines.protocol import Engine
from emag_export.errors import EmagError, EngineError
from emag_export.runtime.batching.banks import Bank, Banks, Room
from emag_export.runtime.batching.job import Admitted, Failed, Finished, Job, JobEvent, Stepped
from emag_export.runtime.batching.pace import Pace
from emag_export.runtime.batching.policy import Policy, oldest_first
from emag_export.runtime.guidance.clean import Clean
from emag_export.runtime.guidance.rules import Rows
from emag_export.runtime.sampling.call import ImageStep
from emag_export.runtime.sampling.plan import Phase

__all__ = ["Call", "Observe", "StepScheduler"]


@dataclass(frozen=True, kw_only=True)
class Call:
    """What one engine call was, for whoever measures."""

    images: int
    guided: int
    """Images with a perturbed row."""
    seconds: float
    """Of the step: engine, guidance and sampler."""
    overhead: float
    """Seconds of the scheduler around it."""
    error: EmagError | None = None


Observe = Callable[[Call], None]


class StepScheduler:
    """Takes images through their runs, as many in a call as pays.

    :meth:`submit` and :meth:`Job.cancel` may be called from any thread; everything else belongs to one.

    Args:
        contract: Of the graph.
        engine: Runs it.
        room: How many images may be live, and share a call.
        policy: Who comes first of those that wait.
        observe: Told of every call.
        clock: Seconds, for deadlines.
    """

    def __init__(
        self,
        contract: DenoiserContract,
        engine: Engine,
        *,
        room: Room,
        policy: Policy = oldest_first,
        observe: Observe = lambda call: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.engine = engine
        self._banks = Banks(contract, room)
        self._policy, self._observe, self._clock = policy, observe, clock
        self._pace = Pace(engine.device)
        self._lock = Lock()
        self._waiting: list[Job] = []

    @property
    def waiting(self) -> int:
        """Images without a place."""
        return len(self._waiting)

    @property
    def live(self) -> int:
        """Images that are being denoised."""
        return self._banks.live

    @property
    def room(self) -> Room:
        """How many images may be live."""
        return self._banks.room

    def remaining_steps(self) -> int:
        """Steps that all images together have still to go."""
        with self._lock:
            waiting = list(self._waiting)
        live = [job for bank in self._banks for job in list(bank.jobs)]
        return sum(job.steps - job.index for job in (*waiting, *live))

    def submit(self, job: Job) -> None:
        """Let an image wait for its place."""
        with self._lock:
            self._waiting.append(job)
            self._waiting.sort(key=lambda waiting: self._policy(waiting.urgency))

    def tick(self) -> bool:
        """Drop who leaves, admit who comes, and make one call.

        Returns:
            Whether there was a call; if not, nobody is live.

        Raises:
            EngineError: If the engine failed. The images of that call have failed, all others are as before;
                exchange :attr:`engine` before the next tick if it is of no more use.
        """
        began = time.perf_counter()
        self._drop_leavers()
        self._admit()
        self._banks.merge()
        bank = self._banks.next()
        if bank is None:
            self._pace.idle()
            return False
        self._banks.called(bank)
        images = [
            ImageStep(step=job.prepared.plan.steps[job.index], guidance=job.prepared.plan.guidance)
            for job in bank.jobs
        ]
        guided = sum(image.step.phase == Phase.GUIDE for image in images)
        try:
            seconds = self._call(bank, images)
        except Exception as error:
            failure = error if isinstance(error, EmagError) else EngineError(f"the engine failed: {error}")
            self._fail_bank(bank, failure)
            self._observe(Call(images=len(images), guided=guided, seconds=0, overhead=0, error=failure))
            raise failure from error
        self._finish(bank)
        overhead = max(0.0, time.perf_counter() - began - seconds)
        self._observe(Call(images=len(images), guided=guided, seconds=seconds, overhead=overhead))
        return True

    def fail_all(self, error: EmagError) -> None:
        """Give up every image, waiting or live."""
        with self._lock:
            waiting, self._waiting = self._waiting, []
        for job in waiting:
            _tell(job, Failed(error=error))
        for bank in self._banks:
            self._fail_bank(bank, error)

    def _drop_leavers(self) -> None:
        now = self._clock()
        with self._lock:
            leaving = [
                (job, reason) for job in self._waiting if (reason := job.reason_to_end(now)) is not None
            ]
            self._waiting = [job for job in self._waiting if job not in dict(leaving)]
        for job, reason in leaving:
            _tell(job, Failed(error=reason))
        for bank in self._banks:
            for place in reversed(range(len(bank.jobs))):
                job = bank.jobs[place]
                if (reason := job.reason_to_end(now)) is not None:
                    self._banks.leave(bank, place)
                    _tell(job, Failed(error=reason))

    def _admit(self) -> None:
        """In the order of the policy; whoever finds no place keeps those behind from taking it."""
        while True:
            with self._lock:
                if not self._waiting or not self._banks.admit(self._waiting[0]):
                    return
                job = self._waiting.pop(0)
            _tell(job, Admitted())

    def _call(self, bank: Bank, images: list[ImageStep]) -> float:
        """One step of a bank; its seconds."""
        noise = None
        for place, job in enumerate(bank.jobs):
            prepared = job.prepared
            if prepared.anneal is not None:
                bank.slots.write_conditioning(place, prepared.anneal(job.index, prepared.conditioning))
        if any(image.step.log_variance is not None for image in images):
            noise = torch.cat([_noise(job) for job in bank.jobs])
        started = time.perf_counter()
        before, result = bank.slots.step(self.engine, images, noise)
        seconds = self._pace.after_call(started)
        for place, job in enumerate(bank.jobs):
            clean = None
            if job.index in job.shown:
                step, row = images[place].step, slice(place, place + 1)
                clean = Clean.of(step.p, step.q).latents(before[row], result.guided[row])
            event = Stepped(index=job.index, steps=job.steps, clean=clean)
            job.index += 1
            _tell(job, event)
        return seconds

    def _finish(self, bank: Bank) -> None:
        for place in reversed(range(len(bank.jobs))):
            job = bank.jobs[place]
            if job.index == job.steps:
                latents = bank.slots.latents(place)
                self._banks.leave(bank, place)
                _tell(job, Finished(latents=latents))

    def _fail_bank(self, bank: Bank, error: EmagError) -> None:
        jobs = list(bank.jobs)
        bank.jobs.clear()
        self._banks.drop(bank)
        for job in jobs:
            _tell(job, Failed(error=error))


def _noise(job: Job) -> Rows:
    noise, step = job.prepared.noise, job.prepared.plan.steps[job.index]
    if noise is None or step.log_variance is None:
        return torch.zeros_like(job.prepared.latents)
    return noise(job.index)


def _tell(job: Job, event: JobEvent) -> None:
    try:
        job.listener(event)
    except Exception:  # a listener that fails harms nobody else's image: its own is given up
        job.cancel()
