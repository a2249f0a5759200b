"""The server as an ASGI app: routes, and what every answer that is no success looks like."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import Body, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from emag_export.serve.errors import ApiError
from emag_export.serve.images import ClientGoneError, Drawing
from emag_export.serve.metrics import Metrics
from emag_export.serve.middleware import Auth, BodyLimit, Outside
from emag_export.serve.models import Models, ServedModel
from emag_export.serve.page import page_routes
from emag_export.serve.requests import Requests
from emag_export.serve.schemas import ErrorBody, GenerationBody, ImagesResponse, ModelList, RequestState
from emag_export.serve.settings import ServerSettings
from emag_export.version import VERSION

__all__ = ["State", "create_app"]


@dataclass(kw_only=True)
class State:
    """What the routes of one server share; ``app.state.server``."""

    models: Models
    settings: ServerSettings
    metrics: Metrics
    requests: Requests = field(default_factory=Requests)
    draining: bool = False
    under_way: int = 0
    """Requests for pictures that have no answer yet."""
    streams: int = 0

    def drain(self) -> None:
        """Take nothing new."""
        self.draining = True
        self.metrics.draining.set(1)


_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (400, 401, 404, 408, 409, 413, 429, 500, 503, 504)
}


def create_app(models: Sequence[ServedModel], settings: ServerSettings, metrics: Metrics) -> FastAPI:
    """The whole server, without a socket.

    Args:
        models: Of ``open_models``; the first is the one that requests without a name get.
        settings: Limits and keys.
        metrics: The same that the models tell of their calls.
    """
    app = FastAPI(
        title="emag-export",
        version=VERSION,
        description="Pictures by EMAG guidance, in the words of the OpenAI Images API.",
        docs_url=None,  # its page loads scripts from elsewhere; the document itself is at /openapi.json
        redoc_url=None,
        responses=_ERRORS,
        routes=page_routes(),
    )
    app.state.server = State(models=Models(models), settings=settings, metrics=metrics)
    _add_errors(app)
    _add_images(app)
    _add_requests(app)
    _add_operations(app)
    app.add_middleware(BodyLimit, settings=settings)
    app.add_middleware(Auth, keys=settings.api_keys, metrics=metrics)
    app.add_middleware(Outside)
    return app


def _add_images(app: FastAPI) -> None:
    state: State = app.state.server

    @app.post(
        "/v1/images/generations",
        response_model=ImagesResponse,
        responses={200: {"content": {"text/event-stream": {}}, "description": "Pictures, or a stream."}},
    )
    async def generations(request: Request, body: Annotated[GenerationBody, Body()]) -> Any:
        """Draw pictures from a prompt; with ``stream`` true as server-sent events."""
        model = state.models.pick(body.model)
        request.state.log |= {"model": model.name, "images": body.n}
        if state.settings.log_prompts:
            request.state.log["prompt"] = body.prompt
        try:
            _require_room(state, model, body)
            request_id = request.state.request_id
            if request_id in state.requests:
                raise ApiError(409, "a request with this x-request-id is known already; leave it out")
            drawing = Drawing(request_id, model, body, state.settings, state.metrics)
            await drawing.start(state.requests)
        except ApiError as error:
            reason = error.code if error.code in _REASONS else "invalid"
            state.metrics.rejected.labels(model=model.name, reason=reason).inc()
            raise
        if body.stream:
            return StreamingResponse(
                _counted(state, drawing),
                media_type="text/event-stream",
                headers={"Cache-Control": "no-store"},
            )
        state.under_way += 1
        try:
            return await drawing.all(request)
        except ClientGoneError:
            return Response(status_code=499)
        finally:
            state.under_way -= 1


_REASONS = ("queue_full", "draining", "not_ready", "too_many_requests", "too_many_streams")


def _require_room(state: State, model: ServedModel, body: GenerationBody) -> None:
    if state.draining:
        raise ApiError(503, "the server is about to end; try another one", code="draining", retry_after=5)
    if state.under_way + state.streams >= state.settings.max_requests:
        raise ApiError(
            429,
            f"{state.settings.max_requests} requests are under way, which is the most; try again later",
            code="too_many_requests",
            retry_after=model.batched.retry_after(),
        )
    if body.stream and state.streams >= state.settings.max_streams:
        raise ApiError(
            429,
            f"{state.settings.max_streams} streams are open, which is the most; try later or without stream",
            code="too_many_streams",
            retry_after=model.batched.retry_after(),
        )


async def _counted(state: State, drawing: Drawing) -> Any:
    state.streams += 1
    state.metrics.streams.set(state.streams)
    stream = drawing.stream()
    try:
        async for event in stream:
            yield event
    finally:
        await stream.aclose()  # type: ignore[attr-defined]
        state.streams -= 1
        state.metrics.streams.set(state.streams)


def _add_requests(app: FastAPI) -> None:
    state: State = app.state.server

    @app.get("/v1/requests/{request_id}", response_model=RequestState)
    async def show(request_id: str) -> RequestState:
        """How far a request is."""
        return state.requests.get(request_id).state

    @app.delete("/v1/requests/{request_id}", response_model=RequestState)
    async def cancel(request_id: str) -> RequestState:
        """Give a request up; its rows are free at the next step."""
        running = state.requests.get(request_id)
        running.cancel()
        return running.state

    @app.get("/v1/models", response_model=ModelList)
    async def models() -> ModelList:
        """The bundles that are served."""
        return ModelList(data=[model.described(state.settings) for model in state.models])

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        """One of them."""
        return state.models.pick(name).described(state.settings)


def _add_operations(app: FastAPI) -> None:
    state: State = app.state.server

    @app.get("/health/live")
    async def live() -> dict[str, str]:
        """The process answers."""
        return {"status": "live"}

    @app.get("/health/ready", responses={503: {"description": "Not now; says why.", "model": dict[str, Any]}})
    async def ready() -> Response:
        """Pictures can be asked for."""
        reasons = {model.name: model.batched.not_ready for model in state.models}
        if state.draining or any(reasons.values()):
            said = "draining" if state.draining else "not ready"
            return JSONResponse({"status": said, "models": reasons}, status_code=503)
        return JSONResponse({"status": "ready"})

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """For Prometheus."""
        text = await asyncio.to_thread(state.metrics.text)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        return JSONResponse(error.body, error.status, headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        problem = error.errors()[0]
        place = [str(part) for part in problem["loc"] if part != "body"]
        if problem["type"] in ("json_invalid", "model_attributes_type") or not place:
            said = "the body is no JSON object; send one with content-type application/json"
            return await refused(request, ApiError(400, said, code="invalid_json"))
        param = ".".join(place)
        unknown = problem["type"] == "extra_forbidden"
        said = (
            f"there is no field '{param}'; leave it out"
            if unknown
            else f"'{param}': {problem['msg'][:1].lower()}{problem['msg'][1:]}"
        )
        code = "unknown_parameter" if unknown else "invalid_value"
        return await refused(request, ApiError(400, said, param=param, code=code))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        said = {404: "there is nothing at this address", 405: "this address takes another method"}
        message = said.get(error.status_code, "this request cannot be answered")
        return await refused(request, ApiError(error.status_code, message))
