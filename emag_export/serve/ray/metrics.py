"""Figures of many processes on one page, told apart by a label."""

from collections.abc import Iterable
from types import SimpleNamespace

from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

__all__ = ["LABEL", "joined_metrics"]

LABEL = "replica"


def joined_metrics(pages: Iterable[tuple[str, str]]) -> bytes:
    """One page of several, in Prometheus' text format.

    Args:
        pages: What each process is called, and its own page.
    """
    families: dict[str, Metric] = {}
    for name, text in pages:
        for family in text_string_to_metric_families(text):
            known = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                labels = {**sample.labels, LABEL: name}
                known.add_sample(sample.name, labels, sample.value, sample.timestamp, sample.exemplar)
    return generate_latest(SimpleNamespace(collect=families.values))
