"""What the model does in Triton, without Triton: pictures by key, all of them one step further at a time."""

from collections.abc import Hashable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from emag_export.bundle import Bundle
from emag_export.engines.config import EngineConfig
from emag_export.engines.registry import open_backend
from emag_export.errors import EmagError, EngineError
from emag_export.runtime.batching.banks import Room
from emag_export.runtime.batching.job import Failed, Finished, Job, JobEvent, Urgency
from emag_export.runtime.batching.scheduler import StepScheduler
from emag_export.runtime.keywords import request_for
from emag_export.runtime.pictures.metadata import make_picture
from emag_export.runtime.pipeline import Pipeline
from emag_export.runtime.request import GenerationRequest, check_prompts, plan_request
from emag_export.serve.triton.parameters import Limits

__all__ = ["StepBackend"]

PATIENCE = 2
"""Times as many steps as pictures can be live; then a picture is given up that nobody asked for meanwhile.

Triton drops requests that were cancelled, and does not tell the model. It asks for requests with other inputs
in turns; one that was given up too early would only be begun again.
"""


class StepBackend:
    """Pictures under way, by a key that their caller chooses. One thread uses it.

    Args:
        bundle: Folder.
        engine: How components are opened.
        images: That share a call, and are live.
        limits: Of a request; None are those that suit the bundle.
    """

    def __init__(self, bundle: Path, engine: EngineConfig, images: int, limits: Limits | None = None) -> None:
        self.bundle = Bundle(bundle)
        self._limits = limits or Limits.of(self.bundle)
        self._pipeline = Pipeline(self.bundle, open_backend(engine, self.bundle))
        self.calls: list[int] = []
        """Images of the last calls, the newest last."""
        self._scheduler = StepScheduler(
            self.bundle.contract,
            self._pipeline.denoiser,
            room=Room(per_call=images, live=images),
            observe=lambda call: self._count(call.images),
        )
        self._broken = False
        self._jobs: dict[Hashable, tuple[Job, GenerationRequest]] = {}
        self._ends: dict[Hashable, bytes | EmagError] = {}
        self._asked: dict[Hashable, int] = {}
        """Step after which somebody last asked for a picture."""
        self._steps, self._patience = 0, PATIENCE * images
        self._number = 0

    def __contains__(self, key: Hashable) -> bool:
        return key in self._asked

    def start(self, key: Hashable, prompt: str, keywords: Mapping[str, Any]) -> None:
        """Take a request; it joins the next step.

        Args:
            key: Of nobody else.
            prompt: What to draw.
            keywords: Of :class:`~emag_export.runtime.keywords.SamplingKeywords`.

        Raises:
            EmagError: If it cannot be drawn.
        """
        request = request_for(self.bundle, prompt, keywords)  # type: ignore[arg-type]
        self._limits.check(request)
        check_prompts(self.bundle, request)
        plan_request(self.bundle, request)
        try:
            prepared = self._pipeline.prepare([request])
        except Exception as error:
            raise _known(error) from error
        self._number += 1
        job = Job(
            prepared=prepared,
            listener=lambda event: self._heard(key, event),
            urgency=Urgency(arrived=0.0, number=self._number),
        )
        self._jobs[key], self._asked[key] = (job, request), self._steps
        self._scheduler.submit(job)

    def step(self) -> None:
        """Take all live pictures one step further. An engine that fails ends those of its call."""
        if self._broken:
            self._reopen()
        try:
            if not self._broken:
                self._scheduler.tick()
        except EmagError:
            self._reopen()
        except Exception as error:  # not of the engine's call: whoever it hit would wait for ever
            self._scheduler.fail_all(_known(error))
        self._steps += 1
        self._forget()

    def cancel(self, key: Hashable) -> None:
        """Give a picture up before its next step."""
        if key in self._jobs:
            self._jobs[key][0].cancel()

    def take(self, key: Hashable) -> bytes | EmagError | None:
        """A PNG or an error, once; None while it is under way."""
        found = self._ends.pop(key, None)
        if found is not None:
            del self._asked[key]
        elif key in self._asked:
            self._asked[key] = self._steps
        return found

    def close(self) -> None:
        """Free the engines."""
        self._pipeline.close()

    def _reopen(self) -> None:
        """Exchange the engine; if that fails, all pictures have failed and the next step tries again."""
        try:
            self._pipeline.reopen_denoiser()
        except EmagError as error:
            self._broken = True
            self._scheduler.fail_all(error)
        else:
            self._broken = False
            self._scheduler.engine = self._pipeline.denoiser

    def _forget(self) -> None:
        for key in [key for key, asked in self._asked.items() if self._steps - asked > self._patience]:
            if key in self._jobs:
                self.cancel(key)  # it ends with the next step, and is forgotten after it
            else:
                del self._ends[key], self._asked[key]

    def _heard(self, key: Hashable, event: JobEvent) -> None:
        if isinstance(event, Failed):
            self._jobs.pop(key)
            self._ends[key] = event.error
        elif isinstance(event, Finished):
            _, request = self._jobs.pop(key)
            try:
                self._ends[key] = self._png(event, request)
            except Exception as error:  # of this picture alone
                self._ends[key] = _known(error)

    def _png(self, finished: Finished, request: GenerationRequest) -> bytes:
        (pixels,) = self._pipeline.decode(finished.latents)
        buffer = BytesIO()
        picture = make_picture(pixels, self.bundle, request, self._pipeline.denoiser.name)
        picture.save(buffer, format="PNG")
        return buffer.getvalue()

    def _count(self, images: int) -> None:
        self.calls = [*self.calls[-999:], images]


def _known(error: Exception) -> EmagError:
    return error if isinstance(error, EmagError) else EngineError(f"the engine failed: {error}")
