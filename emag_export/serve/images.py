"""Pictures over HTTP: all at once when they are finished, or as a stream with previews."""

import asyncio
import base64
import json
import time
from collections.abc import AsyncGenerator
from io import BytesIO
from typing import Any

from PIL import Image
from pydantic import BaseModel

from emag_export.errors import EmagError
from emag_export.runtime.batching.ticket import Drawn, Ended, Progressed, Ticket
from emag_export.runtime.request import GenerationRequest
from emag_export.serve.errors import ApiError, api_error
from emag_export.serve.metrics import Metrics
from emag_export.serve.models import ServedModel
from emag_export.serve.requests import Inbox, Requests, Running
from emag_export.serve.schemas import (
    Completed,
    EmagFacts,
    GenerationBody,
    ImageData,
    ImagesResponse,
    PartialImage,
)
from emag_export.serve.settings import ServerSettings
from emag_export.serve.translate import preview_steps, requests_of

__all__ = ["Drawing", "png_text"]

_KEEP_ALIVE = 10.0
"""Seconds of silence after which a stream sends a comment, so that nothing in between hangs up."""


def png_text(picture: Image.Image) -> str:
    """A PNG in base64; finished pictures carry their parameters."""
    buffer = BytesIO()
    picture.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


class Drawing:
    """One request for pictures, from its body to its answer.

    Args:
        request_id: Of the answer.
        model: That draws.
        body: As it came.
        settings: With the limits.
        metrics: Told of the end.
    """

    def __init__(
        self,
        request_id: str,
        model: ServedModel,
        body: GenerationBody,
        settings: ServerSettings,
        metrics: Metrics,
    ) -> None:
        self._id, self._model, self._body = request_id, model, body
        self._settings, self._metrics = settings, metrics
        self._inbox = Inbox()
        self._began = time.monotonic()
        self._tickets: list[Ticket] = []
        self._running: Running | None = None
        self._given_up = False

    async def start(self, requests: Requests) -> None:
        """Take the request, or say why not; :meth:`end` has to follow in both cases.

        Raises:
            ApiError: If it cannot be drawn, or not now.
        """
        try:
            wanted = requests_of(self._body, self._model, self._settings)
            await asyncio.to_thread(self._submit, wanted)
        except EmagError as error:
            raise self._refused(error) from error
        self._running = Running(id=self._id, model=self._model, tickets=self._tickets)
        requests.add(self._running)

    def end(self) -> None:
        """Whatever ended it, nothing goes on, and it is counted."""
        self._given_up = True
        for ticket in self._tickets:
            ticket.cancel()
        if self._running is None:
            return
        self._running.end()
        finished = [ticket for ticket in self._tickets if ticket.status == "completed"]
        outcome = "completed" if len(finished) == len(self._tickets) else self._outcome()
        name = self._model.name
        for ticket in finished:
            self._metrics.finished(name, ticket)
        self._metrics.requests.labels(model=name, outcome=outcome).inc()
        self._metrics.request.labels(model=name).observe(time.monotonic() - self._began)

    async def all(self) -> ImagesResponse:
        """Wait for all pictures.

        Raises:
            ApiError: If one of them fails.
        """
        pictures: dict[int, str] = {}
        while len(pictures) < len(self._tickets):
            index, event = await self._inbox.get()
            if isinstance(event, Ended):
                raise self._refused(event.error)
            if isinstance(event, Drawn):
                pictures[index] = await asyncio.to_thread(png_text, event.picture)
        return self._answer(pictures)

    async def stream(self) -> AsyncGenerator[str]:
        """Server-sent events: previews, then every picture; at last an error, if there is one."""
        left, previews = len(self._tickets), 0
        while left:
            try:
                index, event = await asyncio.wait_for(self._inbox.get(), _KEEP_ALIVE)
            except TimeoutError:
                yield ": keep-alive\n\n"
                continue
            if isinstance(event, Ended):
                yield _event("error", self._refused(event.error).body)
                return
            if isinstance(event, Drawn):
                left -= 1
                picture = await asyncio.to_thread(png_text, event.picture)
                yield _event(None, Completed(b64_json=picture, **self._facts(index)))
            elif event.preview is not None:
                yield await self._preview(index, previews, event)
                previews += 1

    def _answer(self, pictures: dict[int, str]) -> ImagesResponse:
        first = self._tickets[0].request
        return ImagesResponse(
            created=int(time.time()),
            data=[
                ImageData(b64_json=pictures[index], seed=ticket.request.seed)
                for index, ticket in enumerate(self._tickets)
            ],
            size=f"{first.width}x{first.height}",
            emag=EmagFacts(
                request_id=self._id,
                model=self._model.name,
                variant=str(self._model.bundle.contract.variant),
                guidance=first.guidance.name,
                steps=first.steps,
                unseen=cut.describe() if (cut := self._tickets[0].cut) else None,
            ),
        )

    async def _preview(self, index: int, number: int, event: Progressed) -> str:
        assert event.preview is not None
        picture = await asyncio.to_thread(png_text, event.preview)
        return _event(
            None,
            PartialImage(
                b64_json=picture,
                partial_image_index=number,
                step=event.index + 1,
                steps=event.steps,
                **self._facts(index),
            ),
        )

    def _submit(self, wanted: list[GenerationRequest]) -> None:
        options = self._body.emag
        seeds = {request.seed: index for index, request in enumerate(wanted)}
        self._tickets = self._model.batched.submit(
            wanted,
            listener=self._inbox.listener(lambda ticket: seeds[ticket.request.seed]),
            shown=preview_steps(self._body, wanted[0].steps),
            priority=options.priority,
            seconds=min(options.deadline or self._settings.deadline, self._settings.deadline),
        )
        if self._given_up:  # while this waited for its thread, so that nobody knew of the tickets
            self.end()

    def _refused(self, error: EmagError) -> ApiError:
        refused = api_error(error, model=self._model.name, path=str(self._model.bundle.path))
        if refused.status == 503:
            refused.retry_after = self._model.batched.retry_after()
        return refused

    def _facts(self, index: int) -> dict[str, Any]:
        request = self._tickets[index].request
        return {
            "created_at": int(time.time()),
            "size": f"{request.width}x{request.height}",
            "image_index": index,
            "seed": request.seed,
        }

    def _outcome(self) -> str:
        late = any(
            ticket.urgency.deadline is not None
            and ticket.status == "failed"
            and ticket.times.get("ended", 0.0) >= ticket.urgency.deadline
            for ticket in self._tickets
        )
        if late:
            return "expired"
        return "failed" if any(ticket.status == "failed" for ticket in self._tickets) else "cancelled"


def _event(name: str | None, data: BaseModel | dict[str, Any]) -> str:
    if isinstance(data, BaseModel):
        name, text = str(getattr(data, "type", name)), data.model_dump_json()
    else:
        text = json.dumps(data)
    return f"event: {name}\ndata: {text}\n\n"
