"""Contenders take turns step by step, so that whatever slows the machine down slows all of them."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from statistics import median, quantiles

from emag_export.bench.contender import Contender
from emag_export.bench.timing import StepTime
from emag_export.errors import InputError
from emag_export.runtime.plan import Phase

__all__ = ["Progress", "Ratio", "Result", "race"]

Progress = Callable[[int, int], None]
"""(steps done, steps in all)."""

_RESAMPLES = 300


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """How many times as long, and the interval that nine of ten resampled measurements lie in."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was measured of one contender."""

    contender: Contender
    times: tuple[StepTime, ...]
    """Every step of every round, but for the first of each phase, which warms up."""

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


def race(
    contenders: Sequence[Contender], *, rounds: int = 1, progress: Progress | None = None
) -> list[Result]:
    """Run all contenders ``rounds`` times: the first step of each, then the second of each, and so on.

    Args:
        contenders: Take turns; who begins changes with every step.
        rounds: Whole runs of each.
        progress: Told after every step.
    """
    total = rounds * sum(len(contender.plan.steps) for contender in contenders)
    times: list[list[StepTime]] = [[] for _ in contenders]
    done = 0
    for _ in range(rounds):
        runs = [contender.steps() for contender in contenders]
        try:
            for index in range(max(len(contender.plan.steps) for contender in contenders)):
                for turn in range(len(runs)):
                    number = (turn + index) % len(runs)
                    if (step := next(runs[number], None)) is None:
                        continue
                    times[number].append(step)
                    done += 1
                    if progress is not None:
                        progress(done, total)
        finally:
            for run in runs:
                run.close()
    return [
        Result(contender=contender, times=_warm(steps))
        for contender, steps in zip(contenders, times, strict=True)
    ]


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
            "measure with the default windows, or with more --steps"
        )
    return sum(count * median(seconds[phase]) for phase, count in Counter(phases).items())


def _resampled(seconds: Mapping[Phase, Sequence[float]], random: Random) -> dict[Phase, list[float]]:
    return {phase: random.choices(values, k=len(values)) for phase, values in seconds.items()}
