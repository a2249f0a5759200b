"""What the model does in Triton, without Triton: pictures by key, all of them one step further at a time."""

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from emag_export.bundle import Bundle
from emag_export.engines.config import EngineConfig
from emag_export.engines.registry import open_backend
from emag_export.errors import ContractError, EmagError, EngineError
from emag_export.runtime.batching.banks import Room
from emag_export.runtime.batching.job import Failed, Finished, Job, JobEvent, Urgency
from emag_export.runtime.batching.scheduler import StepScheduler
from emag_export.runtime.keywords import amended
from emag_export.runtime.pictures.metadata import make_picture
from emag_export.runtime.pipeline import Pipeline
from emag_export.runtime.request import GenerationRequest, default_request, plan_request

__all__ = ["StepBackend"]


class StepBackend:
    """Pictures under way, by a key that their caller chooses. One thread uses it.

    Args:
        bundle: Folder.
        engine: How components are opened.
        images: That share a call, and are live.
    """

    def __init__(self, bundle: Path, engine: EngineConfig, images: int) -> None:
        self.bundle = Bundle(bundle)
        self._pipeline = Pipeline(self.bundle, open_backend(engine, self.bundle))
        self.calls: list[int] = []
        """Images of the last calls, the newest last."""
        self._scheduler = StepScheduler(
            self.bundle.contract,
            self._pipeline.denoiser,
            room=Room(per_call=images, live=images),
            observe=lambda call: self._count(call.images),
        )
        self._jobs: dict[str, tuple[Job, GenerationRequest]] = {}
        self._ends: dict[str, bytes | EmagError] = {}
        self._number = 0

    def __contains__(self, key: str) -> bool:
        return key in self._jobs or key in self._ends

    def start(self, key: str, prompt: str, keywords: Mapping[str, Any]) -> None:
        """Take a request; it joins the next step.

        Args:
            key: Of nobody else.
            prompt: What to draw.
            keywords: Of :class:`~emag_export.runtime.keywords.SamplingKeywords`.

        Raises:
            InputError: If it cannot be drawn.
        """
        request = amended(default_request(self.bundle, prompt), keywords)  # type: ignore[arg-type]
        plan_request(self.bundle, request)
        self._number += 1
        job = Job(
            prepared=self._pipeline.prepare([request]),
            listener=lambda event: self._heard(key, event),
            urgency=Urgency(arrived=0.0, number=self._number),
        )
        self._jobs[key] = (job, request)
        self._scheduler.submit(job)

    def step(self) -> None:
        """Take all live pictures one step further. An engine that fails ends those of its call."""
        try:
            self._scheduler.tick()
        except ContractError:
            pass
        except EngineError:
            self._pipeline.reopen_denoiser()
            self._scheduler.engine = self._pipeline.denoiser

    def cancel(self, key: str) -> None:
        """Give a picture up before its next step."""
        if key in self._jobs:
            self._jobs[key][0].cancel()

    def take(self, key: str) -> bytes | EmagError | None:
        """A PNG or an error, once; None while it is under way."""
        return self._ends.pop(key, None)

    def close(self) -> None:
        """Free the engines."""
        self._pipeline.close()

    def _heard(self, key: str, event: JobEvent) -> None:
        if isinstance(event, Failed):
            self._jobs.pop(key)
            self._ends[key] = event.error
        elif isinstance(event, Finished):
            _, request = self._jobs.pop(key)
            (pixels,) = self._pipeline.decode(event.latents)
            buffer = BytesIO()
            picture = make_picture(pixels, self.bundle, request, self._pipeline.denoiser.name)
            picture.save(buffer, format="PNG")
            self._ends[key] = buffer.getvalue()

    def _count(self, images: int) -> None:
        self.calls = [*self.calls[-999:], images]
