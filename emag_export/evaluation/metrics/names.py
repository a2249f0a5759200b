"""Names of the metrics, and the models that some of them need; nothing heavy is imported here."""

from dataclasses import dataclass

__all__ = ["METRICS", "MetricModels"]

METRICS = (
    "drawn",
    "accuracy",
    "clip",
    "pickscore",
    "hps",
    "diversity",
    "drawn-distribution",
    "distribution",
)
"""In the order of their columns."""


@dataclass(frozen=True, kw_only=True)
class MetricModels:
    """Weights of metrics that have some: folders or hub ids."""

    clip: str = "openai/clip-vit-large-patch14"
    pickscore: str = "yuvalkirstain/PickScore_v1"
    hps: str = "adams-story/HPSv2-hf"
    """HPSv2 as a CLIP model of transformers."""
    device: str = ""
    """Where they run; empty is the CPU."""
