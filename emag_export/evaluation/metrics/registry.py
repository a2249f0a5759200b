"""Metrics by name, and which of them a model and its prompts allow."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from emag_export.errors import InputError
from emag_export.evaluation.metrics.accuracy import Accuracy
from emag_export.evaluation.metrics.clip import ClipScore, HpsScore, PickScore
from emag_export.evaluation.metrics.clip_distribution import ClipDistribution, reference_pictures
from emag_export.evaluation.metrics.diversity import Diversity
from emag_export.evaluation.metrics.drawn import Drawn
from emag_export.evaluation.metrics.drawn_distribution import DrawnDistribution
from emag_export.evaluation.metrics.names import METRICS, MetricModels
from emag_export.evaluation.metrics.protocol import Column, Metric, SeedMetric, SetMetric
from emag_export.evaluation.truth import Truth, require_scenes, truth_of
from emag_export.labels import ClassLabels

__all__ = ["Chosen", "choose_metrics", "quality_of"]

_SCENES = ("drawn", "accuracy", "drawn-distribution")
_SINGLE = ("drawn", "accuracy", "clip", "pickscore", "hps")
_OWN = ("drawn", "accuracy")
"""Taken where prompts describe scenes and no metric is named."""


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The metrics of an evaluation."""

    pictures: tuple[Metric, ...]
    together: tuple[SeedMetric, ...]
    sets: SetMetric | None = None
    """Holds all pictures of a setting against reference pictures."""

    @property
    def columns(self) -> tuple[Column, ...]:
        """Of all of them."""
        metrics: list[Metric | SeedMetric] = [*self.pictures, *self.together]
        return tuple(column for metric in metrics for column in metric.columns)

    def only(self, column: Column) -> "Chosen":
        """What gives one column, and nothing else.

        Args:
            column: One of :attr:`columns`.
        """
        return Chosen(
            pictures=tuple(metric for metric in self.pictures if column in metric.columns),
            together=tuple(metric for metric in self.together if column in metric.columns),
        )


def choose_metrics(
    names: Sequence[str] | None,
    prompts: Sequence[str],
    labels: ClassLabels | None,
    models: MetricModels,
    reference: Path | None = None,
    tuning: Sequence[str] = (),
) -> Chosen:
    """Metrics by name.

    Args:
        names: Of :data:`METRICS`; None takes all that need no weights and suit the prompts.
        prompts: That are reported.
        labels: Of the model; None where prompts are text.
        models: Weights.
        reference: Folder of pictures, for the metric ``distribution``.
        tuning: Prompts to tune on, which are measured too.

    Raises:
        InputError: If there is no such metric, a prompt describes nothing that it could measure, or a
            metric and ``reference`` miss each other.
    """
    truth = truth_of(labels)
    if names is None:
        readable = all(truth(prompt) is not None for prompt in (*prompts, *tuning))
        names = (*(_OWN if readable else ()), "diversity")
    if unknown := [name for name in names if name not in METRICS]:
        raise InputError(f"there is no metric {unknown[0]!r} in `metrics`; there are {', '.join(METRICS)}")
    if any(name in _SCENES for name in names):
        require_scenes(truth, (*prompts, *tuning))
    made = {name: _picture_metric(name, truth, labels, models) for name in _SINGLE if name in names}
    return Chosen(
        pictures=tuple(made.values()),
        together=(Diversity(),) if "diversity" in names else (),
        sets=_sets(names, prompts, truth, models, reference),
    )


def _sets(
    names: Sequence[str], prompts: Sequence[str], truth: Truth, models: MetricModels, reference: Path | None
) -> SetMetric | None:
    if ("distribution" in names) != (reference is not None):
        raise InputError(
            "the metric distribution and `reference`, a folder of pictures, need each other; give both"
        )
    if reference is None:
        return DrawnDistribution(truth, prompts) if "drawn-distribution" in names else None
    if "drawn-distribution" in names:
        raise InputError(
            "distribution and drawn-distribution give the same columns; choose one of the two in `metrics`"
        )
    reference_pictures(reference)
    return ClipDistribution(ClipScore(models.clip, device=models.device), reference)


def _picture_metric(name: str, truth: Truth, labels: ClassLabels | None, models: MetricModels) -> Metric:
    if name == "drawn":
        return Drawn(truth)
    if name == "accuracy":
        return Accuracy(truth, classes=labels is not None)
    if name == "clip":
        return ClipScore(models.clip, device=models.device)
    if name == "pickscore":
        return PickScore(models.pickscore, device=models.device)
    return HpsScore(models.hps, device=models.device)


def quality_of(name: str | None, columns: Sequence[Column]) -> str:
    """The column that stands for quality: the given one, or the first in which a direction is better.

    Raises:
        InputError: If there is none.
    """
    ranked = [column.name for column in columns if column.better != "neither"]
    if name is None and ranked:
        return ranked[0]
    if name not in ranked:
        raise InputError(
            f"`quality` is {name}, which these `metrics` do not give; choose from {', '.join(ranked)}"
            if ranked
            else "these `metrics` rank nothing: no prompt describes a scene of the small models; "
            "add clip, pickscore or hps"
        )
    return name
