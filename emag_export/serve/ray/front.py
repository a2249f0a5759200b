"""The front of a Ray application: takes every request, lets a replica answer it, and words what Ray cannot.

It is an ASGI app without an engine. Pictures and their errors are made by the replicas, with the same app as
in a server without Ray; the front checks keys and sizes, chooses the model, repeats a request whose replica
died, and joins what all replicas say where one alone does not know.
"""

import json
from collections.abc import Mapping
from contextlib import aclosing
from typing import Any

from emag_export.serve.errors import ApiError
from emag_export.serve.metrics import Metrics
from emag_export.serve.middleware import App, Auth, BodyLimit, Outside, Receive, Scope, Send, send_error
from emag_export.serve.ray.metrics import joined_metrics
from emag_export.serve.ray.replicas import NoReplicaError, ReplicaLostError, Replicas
from emag_export.serve.ray.wire import HttpAnswer, HttpRequest, Message, answer_of, read_request
from emag_export.serve.settings import ServerSettings

__all__ = ["Front", "live"]

_ATTEMPTS = 2
"""A request whose replica died before it answered goes to another one, once: a request that kills replicas
must not kill them all."""
_OUTER_HEADERS = (b"x-request-id", b"x-content-type-options")
"""Those that the layers around the front set anew."""
_JSON = ((b"content-type", b"application/json"),)


class Front:
    """Answers for all models of an application.

    Args:
        models: By name; the first is the one that requests without a name get.
        settings: With keys and limits.
        name: Of this process, for its own figures.
    """

    def __init__(self, models: Mapping[str, Replicas], settings: ServerSettings, name: str = "front") -> None:
        self._models, self._name = dict(models), name
        self._first_name = next(iter(self._models))
        self._metrics = Metrics()
        self._draining, self._under_way = False, 0
        self._log_prompts = settings.log_prompts
        limited = BodyLimit(self._answer, settings)
        self._app: App = Outside(Auth(limited, settings.api_keys, self._metrics))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "lifespan":
            await live(receive, send)
        elif scope["type"] == "http":
            await self._app(scope, receive, send)

    @property
    def _first(self) -> Replicas:
        return self._models[self._first_name]

    def drain(self) -> int:
        """Take no more requests for pictures; says how many are still under way."""
        self._draining = True
        self._metrics.draining.set(1)
        return self._under_way

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = await read_request(scope, receive)
        if request is None:
            return
        try:
            await self._dispatch(request, scope["state"]["log"], send)
        except ApiError as error:
            await send_error(send, error)

    async def _dispatch(self, request: HttpRequest, facts: dict[str, Any], send: Send) -> None:
        match request.method, request.path.strip("/").split("/"):
            case "POST", ["v1", "images", "generations"]:
                await self._generate(request, facts, send)
            case "GET", ["v1", "models"]:
                await _send(send, await self._list_models(request))
            case "GET", ["v1", "models", name]:
                await self._pass_on(self._models.get(name, self._first), request, send)
            case "GET" | "DELETE", ["v1", "requests", _]:
                await _send(send, await self._find_request(request))
            case "GET", ["health", "live"]:
                await _send(send, _json({"status": "live"}))
            case "GET", ["health", "ready"]:
                await _send(send, await self._ready(request))
            case "GET", ["metrics"]:
                await _send(send, await self._all_metrics(request))
            case _:
                await self._pass_on(self._first, request, send)

    async def _generate(self, request: HttpRequest, facts: dict[str, Any], send: Send) -> None:
        if self._draining:
            raise ApiError(503, "the server is about to end; try another one", code="draining", retry_after=5)
        fields = _fields(request)
        name = next((name for name in self._models if name == fields.get("model")), self._first_name)
        facts |= {"model": name, "images": fields.get("n", 1)}
        if self._log_prompts:
            facts["prompt"] = fields.get("prompt")
        self._under_way += 1
        try:
            await self._pass_on(self._models[name], request, send)
        finally:
            self._under_way -= 1

    async def _pass_on(self, replicas: Replicas, request: HttpRequest, send: Send) -> None:
        for attempt in range(1, _ATTEMPTS + 1):
            started = _Started(send)
            try:
                async with aclosing(replicas.stream(request)) as messages:
                    async for message in messages:
                        await started.send(message)
                return
            except ReplicaLostError as error:
                if started.begun or attempt == _ATTEMPTS:
                    await started.fail(error)
                    return
            except ApiError as error:
                await started.fail(error)
                return

    async def _list_models(self, request: HttpRequest) -> HttpAnswer:
        data: list[Any] = []
        for replicas in self._models.values():
            answer = await answer_of(replicas.stream(request))
            if answer.status != 200:
                return answer
            data += json.loads(answer.body)["data"]
        return _json({"object": "list", "data": data})

    async def _find_request(self, request: HttpRequest) -> HttpAnswer:
        """Of the replica that knows it; they know only their own."""
        found = [answer for _, answer in await self._everyone(request)]
        known = [answer for answer in found if answer.status != 404]
        return next(iter(known or found))

    async def _ready(self, request: HttpRequest) -> HttpAnswer:
        """Ready is a server that has a ready replica of every model."""
        if self._draining:
            return _json({"status": "draining"}, status=503)
        answer = None
        for name, replicas in self._models.items():
            answers = [answer for _, answer in await replicas.everyone(request)]
            answer = min(answers, key=lambda answer: answer.status, default=None)
            if answer is None:
                return _json({"status": "not ready", "models": {name: "no replica is running"}}, status=503)
            if answer.status != 200:
                return answer
        assert answer is not None
        return answer

    async def _all_metrics(self, request: HttpRequest) -> HttpAnswer:
        pages = [(self._name, self._metrics.text().decode())]
        kind: tuple[tuple[bytes, bytes], ...] = ()
        for replicas in self._models.values():
            for name, answer in await replicas.everyone(request):
                pages.append((name, answer.body.decode()))
                kind = tuple(header for header in answer.headers if header[0] == b"content-type")
        return HttpAnswer(status=200, headers=kind, body=joined_metrics(pages))

    async def _everyone(self, request: HttpRequest) -> list[tuple[str, HttpAnswer]]:
        answers = [one for replicas in self._models.values() for one in await replicas.everyone(request)]
        if not answers:
            raise NoReplicaError
        return answers


class _Started:
    """Passes an answer on, and knows whether anything of it has left.

    The beginning waits for the first bytes of the body: a replica that dies before them costs nothing.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: Message | None = None
        self._streams = False
        self.begun = False

    async def send(self, message: Message) -> None:
        """The next message of a replica."""
        if message["type"] == "http.response.start":
            headers = [header for header in message.get("headers", ()) if header[0] not in _OUTER_HEADERS]
            self._start = {**message, "headers": headers}
            self._streams = any(value.startswith(b"text/event-stream") for _, value in headers)
            return
        if self._start is not None:
            start, self._start = self._start, None
            self.begun = True
            await self._send(start)
        await self._send(message)

    async def fail(self, error: ApiError) -> None:
        """End with an error: in an answer of its own, or as the last event of a stream.

        Raises:
            ApiError: If half of something else has left, which only a broken connection can end.
        """
        if not self.begun:
            await send_error(self._send, error)
        elif self._streams:
            event = f"event: error\ndata: {json.dumps(error.body)}\n\n"
            await self._send({"type": "http.response.body", "body": event.encode()})
        else:
            raise error


def _fields(request: HttpRequest) -> dict[str, Any]:
    """Of the body; one that cannot be read has none, and is for a replica to refuse."""
    try:
        found = json.loads(request.body)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _json(data: Mapping[str, Any], *, status: int = 200) -> HttpAnswer:
    return HttpAnswer(status=status, headers=_JSON, body=json.dumps(data).encode())


async def _send(send: Send, answer: HttpAnswer) -> None:
    started = _Started(send)
    for message in answer.messages:
        await started.send(message)


async def live(receive: Receive, send: Send) -> None:
    """The lifespan protocol of an app that has nothing to begin or to end."""
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
