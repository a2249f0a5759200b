"""What is asked of an evaluation, and whether it can be done."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from emag_export.bundle import Bundle
from emag_export.errors import InputError
from emag_export.evaluation.metrics.names import MetricModels
from emag_export.evaluation.metrics.registry import Chosen, choose_metrics, quality_of
from emag_export.evaluation.prompts import require_disjoint
from emag_export.evaluation.settings import Setting, bundle_for, settings_of
from emag_export.evaluation.trials import MOST_SEEDS, Trials
from emag_export.runtime.keywords import SamplingKeywords

__all__ = ["Evaluation", "check_evaluation", "reported_settings", "trials_for"]

_SWEEP_SEED = 10**9
"""Added to the seeds of prompts to tune on, so that they share no noise with those that are reported."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is asked for."""

    bundles: tuple[Bundle, ...]
    """Variants of one model."""
    methods: tuple[str, ...]
    prompts: tuple[str, ...]
    seeds: int = 4
    seed: int = 0
    """Of the first picture of the first prompt."""
    scales: tuple[float, ...] = ()
    """w; none is the bundle's own."""
    emag_scales: tuple[float, ...] = ()
    """s, likewise."""
    sweep: tuple[str, ...] = ()
    """Prompts to tune scales on; none leaves them as they are."""
    baseline: str | None = None
    """Method that the others are tested against; None takes ``cfg``, or the first of the methods."""
    metrics: tuple[str, ...] | None = None
    quality: str | None = None
    """Column to tune by, and to plot against cost; None is the first."""
    models: MetricModels
    reference: Path | None = None
    """Folder of pictures, for the metric ``distribution``."""
    keywords: SamplingKeywords
    """The same for every method."""
    probes: int = 0
    """Prompts whose predictions are looked at."""
    engine: str = ""
    """Backend and device, for people."""

    @property
    def chosen(self) -> Chosen:
        """Its metrics."""
        return choose_metrics(
            self.metrics,
            self.prompts,
            self.bundles[0].labels,
            self.models,
            reference=self.reference,
            tuning=self.sweep,
        )

    @property
    def against(self) -> str | None:
        """The baseline; None where there is nothing to compare with."""
        if self.baseline is not None:
            return self.baseline
        return "cfg" if "cfg" in self.methods else self.methods[0]


def check_evaluation(asked: Evaluation) -> None:
    """Refuse what could not be finished, before any work begins.

    Raises:
        InputError: If bundles are of different models or the same variant, the baseline is not among the
            methods, scales are given and tuned, prompts are tuned on and reported, or a setting or metric
            does not fit the model.
    """
    first = asked.bundles[0]
    variants = [bundle.contract.variant for bundle in asked.bundles]
    if len(set(variants)) < len(variants):
        raise InputError("two bundles are of the same variant; give one of each")
    for bundle in asked.bundles[1:]:
        if bundle.provenance.weights != first.provenance.weights:
            raise InputError(
                f"{bundle.path} was made of another model than {first.path}, or with other LoRAs; compare "
                "variants of one model"
            )
    if asked.against not in asked.methods:
        raise InputError(f"`baseline` {asked.against} is not among `methods`; add it there")
    if not 1 <= asked.seeds <= MOST_SEEDS:
        raise InputError(f"`seeds` is {asked.seeds}; give 1 to {MOST_SEEDS}")
    if asked.sweep and (asked.scales or asked.emag_scales):
        raise InputError("`sweep` tunes the scales; leave out `scales` and `emag_scales`, or `sweep`")
    require_disjoint(asked.prompts, asked.sweep)
    quality_of(asked.quality, asked.chosen.columns)
    for trials in trials_for(asked, reported_settings(asked), asked.prompts, Path()):
        trials.check()


def reported_settings(asked: Evaluation) -> list[Setting]:
    """What is compared, at the scales that were given or are the bundle's own."""
    return settings_of(asked.methods, asked.bundles, asked.scales, asked.emag_scales)


def trials_for(
    asked: Evaluation, settings: Sequence[Setting], prompts: Sequence[str], output: Path
) -> list[Trials]:
    """The pictures of each bundle that draws some."""
    made = []
    for bundle in asked.bundles:
        own = tuple(setting for setting in settings if bundle_for(setting, asked.bundles) is bundle)
        if own:
            trials = Trials(
                bundle=bundle,
                output=output / str(bundle.contract.variant),
                settings=own,
                prompts=tuple(prompts),
                seeds=asked.seeds,
                seed=asked.seed + (_SWEEP_SEED if prompts == asked.sweep else 0),
                keywords=asked.keywords,
            )
            made.append(trials)
    return made
