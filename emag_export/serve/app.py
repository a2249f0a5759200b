"""The server as an ASGI app: routes, and what every answer that is no success looks like."""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any

from fastapi import Body, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from emag_export.serve.clients import ClientGoneError, EventStream, unless_gone
from emag_export.serve.document import document
from emag_export.serve.errors import ApiError
from emag_export.serve.images import Drawing
from emag_export.serve.metrics import Metrics
from emag_export.serve.middleware import Auth, BodyLimit, Outside
from emag_export.serve.models import Models, ServedModel
from emag_export.serve.page import page_routes
from emag_export.serve.requests import Requests
from emag_export.serve.schemas import GenerationBody, ImagesResponse, ModelFacts, ModelList, RequestState
from emag_export.serve.settings import ServerSettings
from emag_export.version import VERSION

__all__ = ["State", "create_app"]

_REASONS = ("queue_full", "draining", "not_ready", "too_many_requests", "too_many_streams")
_LONGEST_NAME = 100
"""Of a field that does not exist, in the answer that says so."""


@dataclass(kw_only=True)
class State:
    """What the routes of one server share; ``app.state.server``."""

    models: Models
    settings: ServerSettings
    metrics: Metrics
    requests: Requests = field(default_factory=Requests)
    draining: bool = False
    here: set[str] = field(default_factory=set)
    """Ids of requests for pictures whose answers are not finished."""
    streams: int = 0
    """Of them, those whose answers are streams."""

    def drain(self) -> None:
        """Take nothing new."""
        self.draining = True
        self.metrics.draining.set(1)

    @contextmanager
    def place(self, request_id: str, model: ServedModel, *, stream: bool) -> Iterator[None]:
        """Hold one of the places for requests, from before it is looked at until its answer is over.

        Raises:
            ApiError: If there is none.
        """
        self._require_room(request_id, model, stream)
        self.here.add(request_id)
        self.streams += stream
        self.metrics.streams.set(self.streams)
        try:
            yield
        finally:
            self.here.discard(request_id)
            self.streams -= stream
            self.metrics.streams.set(self.streams)

    @contextmanager
    def refusals(self, model: str) -> Iterator[None]:
        """Count what is refused, by its reason."""
        try:
            yield
        except ApiError as error:
            reason = error.code if error.code in _REASONS else "invalid"
            self.metrics.rejected.labels(model=model, reason=reason).inc()
            raise

    def _require_room(self, request_id: str, model: ServedModel, stream: bool) -> None:
        if self.draining:
            raise ApiError(503, "the server is about to end; try another one", code="draining", retry_after=5)
        if len(self.here) >= self.settings.max_requests:
            raise ApiError(
                429,
                f"{self.settings.max_requests} requests are under way, which is the most; try again later",
                code="too_many_requests",
                retry_after=model.batched.retry_after(),
            )
        if stream and self.streams >= self.settings.max_streams:
            raise ApiError(
                429,
                f"{self.settings.max_streams} streams are open, the most; try later, or without 'stream'",
                code="too_many_streams",
                retry_after=model.batched.retry_after(),
            )
        if request_id in self.here or request_id in self.requests:
            raise ApiError(409, "a request with this x-request-id is known already; leave it out")


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
        redirect_slashes=False,  # a redirect leads to where the Host header says, and is no error of this API
        routes=page_routes(),
    )
    app.openapi = cache(lambda: document(app, guarded=bool(settings.api_keys)))  # type: ignore[method-assign]
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
        "/v1/images/generations", response_model=ImagesResponse, response_description="Pictures, or a stream."
    )
    async def generations(request: Request, body: Annotated[GenerationBody, Body()]) -> Any:
        """Draw pictures from a prompt; with ``stream`` true as server-sent events."""
        log: dict[str, Any] = request.state.log
        if state.settings.log_prompts:
            log["prompt"] = body.prompt
        with state.refusals(""):
            model = state.models.pick(body.model)
        log |= {"model": model.name, "images": body.n}
        try:
            return await _drawn(state, model, request, body)
        except ClientGoneError:
            return Response(status_code=499)


async def _drawn(
    state: State, model: ServedModel, request: Request, body: GenerationBody
) -> EventStream | ImagesResponse:
    request_id = request.state.request_id
    with ExitStack() as stack:
        with state.refusals(model.name):
            stack.enter_context(state.place(request_id, model, stream=body.stream))
            drawing = Drawing(request_id, model, body, state.settings, state.metrics)
            stack.callback(drawing.end)
            await drawing.start(state.requests)
        if body.stream:
            return EventStream(drawing.stream(), stack.pop_all().close)
        return await unless_gone(request.receive, drawing.all())


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

    @app.get("/v1/models/{name}", response_model=ModelFacts)
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
    state: State = app.state.server

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        return JSONResponse(error.body, error.status, headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        state.metrics.rejected.labels(model="", reason="invalid").inc()
        return await refused(request, _invalid(error))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        if (
            error.status_code == 400
        ):  # of FastAPI, where reading JSON failed in another way than by its grammar
            state.metrics.rejected.labels(model="", reason="invalid").inc()
            return await refused(request, _NO_JSON)
        said = {404: "there is nothing at this address", 405: "this address takes another method"}
        message = said.get(error.status_code, "this request cannot be answered")
        return await refused(request, ApiError(error.status_code, message))


_NO_JSON = ApiError(
    400, "the body is no JSON object; send one with content-type application/json", code="invalid_json"
)


def _invalid(error: RequestValidationError) -> ApiError:
    problem = error.errors()[0]
    place = [str(part) for part in problem["loc"] if part != "body"]
    if problem["type"] in ("json_invalid", "model_attributes_type") or not place:
        return _NO_JSON
    param = ".".join(place)
    if len(param) > _LONGEST_NAME:
        param = f"{param[:_LONGEST_NAME]}…"
    if problem["type"] == "extra_forbidden":
        said = f"there is no field '{param}'; leave it out"
        return ApiError(400, said, param=param, code="unknown_parameter")
    said = f"'{param}': {problem['msg'][:1].lower()}{problem['msg'][1:]}"
    return ApiError(400, said, param=param, code="invalid_value")
