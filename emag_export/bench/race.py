"""Contenders take turns step by step, so that whatever slows the machine down slows all of them."""

from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from random import Random
from statistics import median, quantiles

from emag_export.bench.contender import Contender
from emag_export.bench.timing import StepTime
from emag_export.errors import InputError
from emag_export.progress import Event, Progress, silent
from emag_export.runtime.sampling.plan import Phase

__all__ = ["WARM_UP_ROUNDS", "Ratio", "Result", "race"]

_RESAMPLES = 300

WARM_UP_ROUNDS = 2
"""Whole runs on a GPU before the measured ones. Engines that capture CUDA graphs run the first call of a kind
plainly, capture the second, and replay it from the third on. A kind is a number of rows and which of the two
buffers of averages is read; every kind of a run comes at least once in each round."""


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """How many times as long, and its 90 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was measured of one contender."""

    contender: Contender
    times: tuple[StepTime, ...]
    """Every step of every round that counts, but for the first of each phase, which warms up."""

    def phase_seconds(self) -> dict[Phase, list[float]]:
        """Seconds of every step, by phase."""
        return {
            phase: [time.seconds for time in self.times if time.phase is phase]
            for phase in dict.fromkeys(time.phase for time in self.times)
        }

    def seconds(self, steps: int | None = None) -> float:
        """Seconds of a run: of every phase the median, times how often the run has it.

        Args:
            steps: Of another run than the measured one, that has no other phases.
        """
        return _total(self.contender.phases(steps), self.phase_seconds())

    @property
    def outside_engine(self) -> float | None:
        """Share of a run that is not the engine's: loop, guidance, scheduler, selection."""
        if any(time.engine is None for time in self.times):
            return None
        outside: dict[Phase, list[float]] = {}
        for time in self.times:
            outside.setdefault(time.phase, []).append(time.seconds - (time.engine or 0.0))
        return _total(self.contender.phases(), outside) / self.seconds()

    def ratio(self, other: "Result", steps: int | None = None) -> Ratio:
        """Its time over another's.

        Args:
            other: Divides.
            steps: Of both runs; None takes those that were measured.
        """
        mine, others = self.contender.phases(steps), other.contender.phases(steps)
        random = Random(0)
        ratios = [
            _total(mine, _resampled(self.phase_seconds(), random))
            / _total(others, _resampled(other.phase_seconds(), random))
            for _ in range(_RESAMPLES)
        ]
        low, *_, high = quantiles(ratios, n=20)
        return Ratio(value=self.seconds(steps) / other.seconds(steps), low=low, high=high)


def race(contenders: Sequence[Contender], *, rounds: int = 1, progress: Progress = silent) -> list[Result]:
    """Run all contenders ``rounds`` times: the first step of each, then the second of each, and so on.

    Contenders on a GPU run :data:`WARM_UP_ROUNDS` times before that.

    Args:
        contenders: Take turns; who begins changes with every step.
        rounds: Whole runs of each that count.
        progress: Told after every step, of the warm-up too.
    """
    everyone = range(len(contenders))
    on_gpu = [number for number in everyone if contenders[number].device.type == "cuda"]
    turns = [*[on_gpu] * WARM_UP_ROUNDS, *[everyone] * rounds]
    total = sum(len(contenders[number].plan.steps) for numbers in turns for number in numbers)
    times: list[list[StepTime]] = [[] for _ in contenders]
    done = 0
    for turn, numbers in enumerate(turns):
        with closing(_take_turns(contenders, numbers)) as steps:
            for number, step in steps:
                if turn >= WARM_UP_ROUNDS:
                    times[number].append(step)
                done += 1
                progress(Event(component="contenders", phase="step", done=done, total=total))
    return [
        Result(contender=contender, times=_warm(measured))
        for contender, measured in zip(contenders, times, strict=True)
    ]


def _take_turns(
    contenders: Sequence[Contender], numbers: Sequence[int]
) -> Generator[tuple[int, StepTime], None, None]:
    """One run of each contender in ``numbers``: (its number, a step) in the order in which steps are run."""
    runs = {number: contenders[number].steps() for number in numbers}
    try:
        for index in range(max((len(contenders[number].plan.steps) for number in numbers), default=0)):
            for turn in range(len(numbers)):
                number = numbers[(turn + index) % len(numbers)]
                if (step := next(runs[number], None)) is not None:
                    yield number, step
    finally:
        for run in runs.values():
            run.close()


def _warm(times: Sequence[StepTime]) -> tuple[StepTime, ...]:
    """Without the first step of every phase, where that phase has more."""
    often, seen, warm = Counter(time.phase for time in times), set(), []
    for time in times:
        if time.phase in seen or often[time.phase] == 1:
            warm.append(time)
        seen.add(time.phase)
    return tuple(warm)


def _total(phases: Sequence[Phase], seconds: Mapping[Phase, Sequence[float]]) -> float:
    if missing := sorted(set(phases) - set(seconds)):
        raise InputError(
            f"a run of {len(phases)} steps has the phase {missing[0]}, which the measured steps had not; "
            "measure with the default windows, or with more `steps`"
        )
    return sum(count * median(seconds[phase]) for phase, count in Counter(phases).items())


def _resampled(seconds: Mapping[Phase, Sequence[float]], random: Random) -> dict[Phase, list[float]]:
    return {phase: random.choices(values, k=len(values)) for phase, values in seconds.items()}
