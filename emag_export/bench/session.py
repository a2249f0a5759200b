"""A measurement of bundles: open what takes part, let it race, close it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from types import TracebackType
from typing import Any, Self

import torch

# For what they import themselves: imported here, it is no part of any peak.
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler  # noqa: F401

from emag_export.bench.contender import Contender, forked, two_pass
from emag_export.bench.memory import Peak, measure_peak
from emag_export.bench.race import WARM_UP_ROUNDS, Result, race
from emag_export.bundle import DENOISER, Bundle
from emag_export.engines.protocol import Engine
from emag_export.engines.registry import EngineOpener
from emag_export.errors import InputError
from emag_export.exporter.eager import source_of
from emag_export.exporter.source.load import load_recorded
from emag_export.progress import Event, Progress, silent
from emag_export.runtime.guidance.rules import unperturbed
from emag_export.runtime.prepare import Prepared, prepare
from emag_export.runtime.request import GenerationRequest
from emag_export.runtime.text.encoders import random_encoder

__all__ = ["Entry", "Opener", "Setup", "load_original", "measure", "measure_peaks"]

Opener = Callable[[Bundle], EngineOpener]
"""How the components of a bundle are opened on one backend."""

_PEAK_STEPS = 4
"""The fewest steps in which the default windows have every phase."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Something that takes part, not opened yet."""

    bundle: Bundle
    guidance: str
    backend: str | None
    """None is the unmodified diffusers model."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What is measured, and on what."""

    bundles: Sequence[Bundle]
    """Of the same model; its own guidance is measured on the first, whose variant should be the cheapest."""
    backends: Mapping[str, Opener]
    request: GenerationRequest
    images: int = 1
    baseline: bool = True
    """Also the unmodified diffusers model: its own guidance, and the released algorithm for every bundle."""
    baseline_device: str = "cpu"
    """Where that model runs; if it is a GPU, its memory is what :func:`measure_peaks` reads."""
    source: str | None = None
    """Where the source model is now, if it has moved."""

    def __post_init__(self) -> None:
        first, *others = self.bundles
        for bundle in others:
            if bundle.provenance.weights != first.provenance.weights:
                raise InputError(
                    f"{bundle.path} was made of another model than {first.path}, or with other LoRAs; give "
                    "bundles of one model"
                )
            if bundle.described_precision != first.described_precision:
                raise InputError(
                    f"{bundle.path} is {bundle.described_precision}, {first.path} is "
                    f"{first.described_precision}; give bundles of one precision"
                )
        if not self.request.guidance.rule.perturbed:
            raise InputError(
                f"{self.request.guidance.name} is measured beside EMAG anyway; give `guidance` emag or leave "
                "it out"
            )
        steps = self.request.steps
        if len({self.request.guidance.rule_at(index, steps).uncond for index in range(steps)}) > 1:
            raise InputError(
                "some steps would send an unconditional row and others none, but a measurement takes the "
                "steps of a phase to be alike; leave out `guidance_interval`, and give `cfg_zero_init` 0"
            )

    @property
    def own(self) -> str:
        """The model's own guidance, without a hard negative: what everything is compared with."""
        return unperturbed(self.bundles[0].defaults.guidance)

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Everything that takes part, in the order of the table."""
        backends = [*self.backends, *([None] if self.baseline else [])]
        guided = self.request.guidance.name
        return tuple(
            entry
            for backend in backends
            for entry in (
                Entry(bundle=self.bundles[0], guidance=self.own, backend=backend),
                *(Entry(bundle=bundle, guidance=guided, backend=backend) for bundle in self.bundles),
            )
        )

    def prepared(self, entry: Entry, device: torch.device) -> Prepared:
        """Noise and random embeddings; every picture has another prompt."""
        asked = self.request
        guided = replace(asked, guidance=replace(asked.guidance, name=entry.guidance))
        requests = [
            replace(guided, prompt=f"{asked.prompt} {image}", seed=asked.seed + image)
            for image in range(self.images)
        ]
        return prepare(entry.bundle, requests, random_encoder(entry.bundle), device)


class _Opened:
    """Engines and model of a setup, each opened when first needed and closed together."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._stack = ExitStack()
        self._engines: dict[tuple[str, str], Engine] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def contender(self, entry: Entry) -> Contender:
        """An entry, ready to run."""
        if entry.backend is None:
            device = torch.device(self._setup.baseline_device)
            return two_pass(self._model, self._setup.prepared(entry, device))
        key = (entry.backend, str(entry.bundle.path))
        if key not in self._engines:
            opened = self._setup.backends[entry.backend](entry.bundle)(entry.bundle, DENOISER)
            self._engines[key] = self._stack.enter_context(opened)
        engine = self._engines[key]
        return forked(engine, self._setup.prepared(entry, engine.device))

    @cached_property
    def _model(self) -> Any:
        """In the bundles' precision."""
        return load_original(self._setup).to(self._setup.baseline_device)


def load_original(setup: Setup) -> Any:
    """The diffusers model that the bundles were made of, in their precision, on the CPU.

    Raises:
        ModelError: If it is not there, or is another one.
    """
    first = setup.bundles[0]
    return load_recorded(source_of(first, setup.source), first.contract.precision, first.provenance)


def measure(setup: Setup, *, rounds: int = 1, progress: Progress = silent) -> list[Result]:
    """Let everything that takes part take turns, in one process.

    Text encoders and decoder stay closed: they run once per picture, whatever the guidance.

    Args:
        setup: What takes part.
        rounds: Whole runs of each.
        progress: Told after every step.

    Raises:
        ModelError: If the baseline needs the source model and it is not there.
        EngineError: If a backend does not run here.
    """
    with _Opened(setup) as opened, torch.inference_mode():
        return race([opened.contender(entry) for entry in setup.entries], rounds=rounds, progress=progress)


def measure_peaks(setup: Setup, progress: Progress = silent) -> list[Peak]:
    """Peak memory of every entry, each alone in a process of its own, over a short run.

    Device memory is that of ``setup.baseline_device``, where that is a GPU.

    Args:
        setup: What takes part; its openers can be pickled.
        progress: Told after every entry.
    """
    device = torch.device(setup.baseline_device)
    gpu = device if device.type == "cuda" else None
    peaks = []
    for entry in setup.entries:
        peaks.append(measure_peak(partial(_run_alone, setup, entry), gpu))
        progress(Event(component="contenders", phase="memory", done=len(peaks), total=len(setup.entries)))
    return peaks


@contextmanager
def _run_alone(setup: Setup, entry: Entry) -> Iterator[torch.device]:
    """A short run, on a GPU until every call is captured; everything is still open at the yield."""
    short = replace(setup, request=replace(setup.request, steps=min(setup.request.steps, _PEAK_STEPS)))
    with _Opened(short) as opened, torch.inference_mode():
        contender = opened.contender(entry)
        for _ in range(WARM_UP_ROUNDS if contender.device.type == "cuda" else 1):
            for _ in contender.steps():
                pass
        yield contender.device
