"""What a server tells Prometheus."""

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from emag_export.version import VERSION

# A front without an engine counts, too: it shall not load PyTorch for that.
if TYPE_CHECKING:
    from emag_export.runtime.batching.scheduler import Call
    from emag_export.runtime.batching.ticket import Ticket
    from emag_export.serve.models import ServedModel

__all__ = ["METRICS", "Metrics"]

METRICS: Mapping[str, str] = MappingProxyType(
    {
        "emag_requests_total": "counter",
        "emag_rejected_total": "counter",
        "emag_images_total": "counter",
        "emag_queue_images": "gauge",
        "emag_live_images": "gauge",
        "emag_call_seconds": "histogram",
        "emag_call_images": "histogram",
        "emag_scheduler_seconds_total": "counter",
        "emag_request_seconds": "histogram",
        "emag_queue_seconds": "histogram",
        "emag_first_preview_seconds": "histogram",
        "emag_encode_seconds": "histogram",
        "emag_decode_seconds": "histogram",
        "emag_engine_failures_total": "counter",
        "emag_engine_reopened_total": "counter",
        "emag_ready": "gauge",
        "emag_draining": "gauge",
        "emag_open_streams": "gauge",
        "emag_retry_after_seconds": "gauge",
        "emag_build_info": "gauge",
    }
)
"""Name to type, of everything at ``/metrics``."""

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
_CALL_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_IMAGES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        # A second series beside every counter, which nobody here reads.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=self.registry)

        def seconds(name: str, text: str, buckets: Iterable[float] = _SECONDS) -> Histogram:
            return Histogram(name, text, ("model",), buckets=tuple(buckets), registry=self.registry)

        self.requests = counter("emag_requests", "Requests by how they ended.", "model", "outcome")
        self.rejected = counter("emag_rejected", "Requests that were not taken.", "model", "reason")
        self.images = counter("emag_images", "Finished pictures.", "model", "guidance")
        self.failures = counter("emag_engine_failures", "Engine calls that failed.", "model")
        self.scheduler = counter(
            "emag_scheduler_seconds", "Time of the scheduler around engine calls.", "model"
        )
        self.call = Histogram(
            "emag_call_seconds",
            "One step of all images of a call; phase guide has a perturbed row.",
            ("model", "phase"),
            buckets=_CALL_SECONDS,
            registry=self.registry,
        )
        self.call_images = seconds("emag_call_images", "Images that shared a call.", _IMAGES)
        self.request = seconds("emag_request_seconds", "From a request's arrival to its answer.")
        self.queue = seconds("emag_queue_seconds", "From a picture's arrival to its place in calls.")
        self.first_preview = seconds("emag_first_preview_seconds", "From arrival to the first preview.")
        self.encode = seconds("emag_encode_seconds", "Text encoders, of one picture.")
        self.decode = seconds("emag_decode_seconds", "Decoder, of one picture.")
        self.draining = Gauge("emag_draining", "1 once the server is about to end.", registry=self.registry)
        self.streams = Gauge("emag_open_streams", "Answers that are being streamed.", registry=self.registry)
        info = Gauge("emag_build_info", "Version of emag-export.", ("version",), registry=self.registry)
        info.labels(version=VERSION).set(1)

    def watch(self, models: Iterable["ServedModel"]) -> None:
        """Read queues and readiness of models whenever somebody asks."""
        known = tuple(models)
        self.registry.register(_OfModels(known))
        # A series has to stand at 0 first, or nobody can tell that it grew from there to 1.
        for model in known:
            self.failures.labels(model=model.name)
            for outcome in ("completed", "failed", "cancelled", "expired"):
                self.requests.labels(model=model.name, outcome=outcome)
            self.rejected.labels(model=model.name, reason="queue_full")

    def observer(self, model: str) -> "Callable[[Call], None]":
        """What a model's pipeline tells of every engine call."""

        def observe(call: "Call") -> None:
            if call.error is not None:
                self.failures.labels(model=model).inc()
                return
            phase = "guide" if call.guided else "plain"
            self.call.labels(model=model, phase=phase).observe(call.seconds)
            self.call_images.labels(model=model).observe(call.images)
            self.scheduler.labels(model=model).inc(call.overhead)

        return observe

    def finished(self, model: str, ticket: "Ticket") -> None:
        """Take the times of a finished picture into account."""
        self.images.labels(model=model, guidance=ticket.request.guidance.name).inc()
        times = ticket.times
        for histogram, begin, end in (
            (self.queue, "arrived", "admitted"),
            (self.encode, "encoding", "encoded"),
            (self.decode, "decoding", "ended"),
            (self.first_preview, "arrived", "previewed"),
        ):
            if begin in times and end in times:
                histogram.labels(model=model).observe(times[end] - times[begin])

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self.registry)


class _OfModels(Collector):
    """What is read, not counted."""

    def __init__(self, models: tuple["ServedModel", ...]) -> None:
        self._models = models

    def collect(self) -> Iterable[Metric]:
        """One family a figure."""
        figures: tuple[tuple[str, str, Callable[[ServedModel], float]], ...] = (
            ("emag_queue_images", "Images that wait.", lambda model: model.batched.waiting),
            ("emag_live_images", "Images that are being denoised.", lambda model: model.batched.live),
            ("emag_ready", "1 if requests are taken.", lambda model: model.batched.not_ready is None),
            (
                "emag_retry_after_seconds",
                "What a refused client would be told now.",
                lambda model: model.batched.retry_after(),
            ),
        )
        for name, text, figure in figures:
            gauge = GaugeMetricFamily(name, text, labels=("model",))
            for model in self._models:
                gauge.add_metric((model.name,), float(figure(model)))
            yield gauge
        reopened = CounterMetricFamily(
            "emag_engine_reopened", "Engines opened again after they failed.", labels=("model",)
        )
        for model in self._models:
            reopened.add_metric((model.name,), model.batched.reopened)
        yield reopened
