"""Names of the metrics, and the models that some of them need; nothing heavy is imported here."""

from dataclasses import dataclass

__all__ = ["METRICS", "MetricModels"]

METRICS = ("drawn", "accuracy", "clip", "pickscore", "diversity", "distribution")
"""In the order of their columns."""


@dataclass(frozen=True, kw_only=True)
class MetricModels:
    """Weights of metrics that have some: folders or hub ids."""

    clip: str = "openai/clip-vit-large-patch14"
    pickscore: str = "yuvalkirstain/PickScore_v1"
    device: str = ""
    """Where they run; empty is the CPU."""
