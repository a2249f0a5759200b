"""An evaluation from prompts to results: tune if asked, draw, measure, compare."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emag_export.bundle import Bundle
from emag_export.errors import EngineError, InputError
from emag_export.evaluation.features import FeatureStore, reference_pictures, score_sets
from emag_export.evaluation.methods import METHODS, Setting, bundle_for, settings_of
from emag_export.evaluation.metrics.names import MetricModels
from emag_export.evaluation.metrics.protocol import Scores
from emag_export.evaluation.metrics.registry import Chosen, choose_metrics, quality_of
from emag_export.evaluation.probe import contrasts, seconds
from emag_export.evaluation.prompts import require_disjoint
from emag_export.evaluation.results import Results, summarise
from emag_export.evaluation.scoring import PictureScores, score_trials
from emag_export.evaluation.sweep import candidates, choose, sweep_record
from emag_export.evaluation.trials import MOST_SEEDS, Trials
from emag_export.runtime.keywords import SamplingKeywords
from emag_export.serve.batch.draw import BatchResult, record_failures
from emag_export.serve.batch.index import write_index

__all__ = ["Draw", "Evaluation", "Probe", "Watch", "check_evaluation", "evaluate"]

_SWEEP_SEED = 10**9
"""Added to the seeds of prompts to tune on, so that they share no noise with those that are reported."""

Draw = Callable[[Trials], BatchResult]
"""Draws all pictures of one bundle that are not there."""
Probe = Callable[[Trials], None]
"""Runs the probes of one bundle that are not there."""
Watch = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and how much there is."""


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
        prompts = (*self.prompts, *self.sweep)
        return choose_metrics(self.metrics, prompts, self.bundles[0].labels, self.models)

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
        if bundle.provenance.fingerprint != first.provenance.fingerprint:
            raise InputError(
                f"{bundle.path} was made of another model than {first.path}; compare variants of one model"
            )
    if asked.against not in asked.methods:
        raise InputError(f"`baseline` {asked.against} is not among `methods`; add it there")
    if not 1 <= asked.seeds <= MOST_SEEDS:
        raise InputError(f"`seeds` is {asked.seeds}; give 1 to {MOST_SEEDS}")
    if asked.sweep and (asked.scales or asked.emag_scales):
        raise InputError("`sweep` tunes the scales; leave out `scales` and `emag_scales`, or `sweep`")
    require_disjoint(asked.prompts, asked.sweep)
    chosen = asked.chosen
    quality_of(asked.quality, chosen.columns)
    if (chosen.sets is None) != (asked.reference is None):
        raise InputError(
            "the metric distribution and `reference`, a folder of pictures, need each other; give both"
        )
    if asked.reference is not None:
        reference_pictures(asked.reference)
    for trials in _trials(asked, _reported(asked), asked.prompts, Path()):
        trials.check()


def evaluate(
    asked: Evaluation,
    output: Path,
    draw: Draw,
    watch: Watch = lambda what, done, of: None,
    run_probes: Probe = lambda trials: None,
) -> Results:
    """Draw what is missing, measure and compare.

    Args:
        asked: Checked by :func:`check_evaluation`.
        output: Folder; pictures and scores that are there are kept.
        draw: Draws.
        watch: Told of progress.
        run_probes: Probes, if that was asked for; seconds go to ``seconds.json``, as they differ every time.

    Raises:
        EngineError: If pictures could not be drawn; the same call tries them again.
    """
    chosen = asked.chosen
    quality = quality_of(asked.quality, chosen.columns)
    settings, record = _reported(asked), None
    if asked.sweep:
        column = next(column for column in chosen.columns if column.name == quality)
        groups = [candidates(setting) for setting in settings]
        tried = list(dict.fromkeys(setting for group in groups for setting in group))
        pictures = _measured(asked, tried, asked.sweep, output / "sweep", (draw, watch))
        settings = choose(groups, pictures, column)
        record = sweep_record(groups, pictures, column, asked.sweep)
    pictures = _measured(asked, settings, asked.prompts, output, (draw, watch))
    made = _trials(asked, settings, asked.prompts, output)
    costs = {setting: trials.cost(setting) for trials in made for setting in trials.settings}
    contrast = _probed(asked, made, output, run_probes)
    rows, tests = summarise(
        [(setting, costs[setting]) for setting in settings],
        pictures,
        chosen.columns,
        baseline=asked.against,
        sets=_sets(asked, pictures, output, watch),
    )
    return Results(
        facts=_facts(asked),
        prompts=asked.prompts,
        columns=chosen.columns,
        quality=quality,
        settings=rows,
        tests=tests,
        sweep=record,
        contrast=contrast,
        pictures=tuple(pictures),
    )


def _reported(asked: Evaluation) -> list[Setting]:
    return settings_of(asked.methods, asked.bundles, asked.scales, asked.emag_scales)


def _trials(
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


def _measured(
    asked: Evaluation,
    settings: Sequence[Setting],
    prompts: Sequence[str],
    output: Path,
    work: tuple[Draw, Watch],
) -> list[PictureScores]:
    """Draw and score."""
    draw, watch = work
    made = _trials(asked, settings, prompts, output)
    for trials in made:
        result = draw(trials)
        write_index(trials, "jsonl")
        failures = record_failures(trials, result)
        if failures is not None:
            raise EngineError(
                f"{len(result.failed)} pictures could not be drawn, {failures} says which; "
                "the same call tries them again"
            )
    count, done = len(settings) * len(prompts) * asked.seeds, 0

    def tell() -> None:
        nonlocal done
        done += 1
        watch("scoring", done, count)

    chosen = asked.chosen
    return score_trials(made, chosen.pictures, chosen.together, output / "scores", tell)


def _probed(
    asked: Evaluation, made: Sequence[Trials], output: Path, run_probes: Probe
) -> dict[str, list[tuple[int, float]]]:
    """Run the probes, write their seconds down, and say how far the negatives lie."""
    found: dict[str, list[tuple[int, float]]] = {}
    took: dict[str, float] = {}
    for trials in made if asked.probes else ():
        run_probes(trials)
        found |= contrasts(trials, asked.probes)
        took |= seconds(trials, asked.probes)
    if took:
        (output / "seconds.json").write_text(json.dumps(took, indent=1, ensure_ascii=False) + "\n", "utf-8")
    return found


def _sets(
    asked: Evaluation, pictures: Sequence[PictureScores], output: Path, watch: Watch
) -> dict[str, Scores]:
    """Each setting against the reference pictures, if that was asked for."""
    clip = asked.chosen.sets
    if clip is None or asked.reference is None:
        return {}
    references = reference_pictures(asked.reference)
    count, done = len(references) + sum(len(row.paths) for row in pictures), 0

    def tell() -> None:
        nonlocal done
        done += 1
        watch("embedding", done, count)

    return score_sets(pictures, references, FeatureStore(output / "scores", clip), tell)


def _facts(asked: Evaluation) -> dict[str, Any]:
    first = asked.bundles[0]
    words = {name: value for name, value in asked.keywords.items() if value is not None}
    return {
        "model": first.provenance.model,
        "fingerprint": first.provenance.fingerprint,
        "variants": [str(bundle.contract.variant) for bundle in asked.bundles],
        "precision": first.contract.precision,
        "engine": asked.engine,
        "steps": words.get("steps", first.defaults.steps),
        "height": words.get("height", first.defaults.height),
        "width": words.get("width", first.defaults.width),
        "negative_prompt": words.get("negative_prompt", ""),
        "seeds": asked.seeds,
        "seed": asked.seed,
        "baseline": asked.against,
        "methods": {name: METHODS[name].summary for name in asked.methods},
    }
