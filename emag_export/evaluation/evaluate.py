"""An evaluation from prompts to results: tune if asked, draw, measure, compare."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from emag_export.errors import EngineError
from emag_export.evaluation.asked import Evaluation, reported_settings, trials_for
from emag_export.evaluation.features import score_sets
from emag_export.evaluation.methods import method_named
from emag_export.evaluation.metrics.protocol import Scores
from emag_export.evaluation.metrics.registry import Chosen, quality_of
from emag_export.evaluation.probe import Contrast, contrasts, seconds
from emag_export.evaluation.results import Results, summarise
from emag_export.evaluation.scoring import PictureScores, score_trials
from emag_export.evaluation.sweep import candidates, choose, sweep_record
from emag_export.evaluation.trials import Trials
from emag_export.serve.batch.draw import BatchResult, record_failures
from emag_export.serve.batch.index import write_index

__all__ = ["Draw", "Probe", "Watch", "evaluate"]

Draw = Callable[[Trials], BatchResult]
"""Draws all pictures of one bundle that are not there."""
Probe = Callable[[Trials], None]
"""Runs the probes of one bundle that are not there."""
Watch = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and how much there is."""


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
    settings, record = reported_settings(asked), None
    if asked.sweep:
        column = next(column for column in chosen.columns if column.name == quality)
        groups = [candidates(setting) for setting in settings]
        tried = list(dict.fromkeys(setting for group in groups for setting in group))
        tuning = trials_for(asked, tried, asked.sweep, output / "sweep")
        pictures = _measured(tuning, chosen.only(column), output / "sweep", (draw, watch))
        settings = choose(groups, pictures, column)
        record = sweep_record(groups, pictures, column, asked.sweep)
    made = trials_for(asked, settings, asked.prompts, output)
    pictures = _measured(made, chosen, output, (draw, watch))
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
        set_columns=() if chosen.sets is None else chosen.sets.columns,
        quality=quality,
        settings=rows,
        tests=tests,
        sweep=record,
        contrast=contrast,
        pictures=tuple(pictures),
    )


def _measured(
    made: Sequence[Trials], chosen: Chosen, output: Path, work: tuple[Draw, Watch]
) -> list[PictureScores]:
    """Draw and score."""
    draw, watch = work
    for trials in made:
        result = draw(trials)
        write_index(trials, "jsonl")
        failures = record_failures(trials, result)
        if failures is not None:
            raise EngineError(
                f"{len(result.failed)} pictures could not be drawn, {failures} says which; "
                "the same call tries them again"
            )
    count, done = sum(trials.count for trials in made), 0

    def tell() -> None:
        nonlocal done
        done += 1
        watch("scoring", done, count)

    return score_trials(made, chosen.pictures, chosen.together, output / "scores", tell)


def _probed(
    asked: Evaluation, made: Sequence[Trials], output: Path, run_probes: Probe
) -> dict[str, list[Contrast]]:
    """Run the probes, write their seconds down, and say how far the negatives lie."""
    found: dict[str, list[Contrast]] = {}
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
    """Each setting against reference pictures, if that was asked for."""
    metric = asked.chosen.sets
    if metric is None:
        return {}
    count, done = sum(len(row.paths) for row in pictures), 0

    def tell() -> None:
        nonlocal done
        done += 1
        watch("comparing sets", done, count)

    return score_sets(pictures, metric, output / "scores", tell)


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
        "methods": {name: method_named(name).summary for name in asked.methods},
    }
