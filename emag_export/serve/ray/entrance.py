"""The deployment that Ray's HTTP proxies hand requests to: a front in a process of its own."""

from collections.abc import Mapping
from typing import Any

from emag_export.serve.logs import set_up_logs
from emag_export.serve.middleware import Receive, Scope, Send
from emag_export.serve.ray.front import Front, live
from emag_export.serve.ray.replicas import RayReplicas, replica_name
from emag_export.serve.ray.wire import HttpAnswer, HttpRequest, answer_of, messages_of
from emag_export.serve.settings import ServerSettings

__all__ = ["make_entrance"]

_ID = b"x-request-id"


class _Doorway:
    """The ASGI app of the deployment: goes to the front that its replica has made.

    Ray pickles this before there is a front, and its proxy writes the request's id into every answer, where
    one is enough.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "lifespan":
            await live(receive, send)
            return
        from ray import serve

        given = [value for name, value in scope["headers"] if name == _ID]

        async def send_one_id(message: Any) -> None:
            if message["type"] == "http.response.start":
                kept = [
                    (name, value) for name, value in message["headers"] if name != _ID or value not in given
                ]
                message = {**message, "headers": kept}
            await send(message)

        await serve.get_replica_context().servable_object.front(scope, receive, send_one_id)


class _Entrance:
    """What Ray Serve makes one or a few of.

    Args:
        settings: With keys and limits.
        models: By name; in place of deployments Ray Serve passes handles of them.
    """

    def __init__(self, settings: ServerSettings, models: Mapping[str, Any]) -> None:
        set_up_logs(settings.log_format)
        name = f"front-{replica_name()}"
        self.front = Front({name: RayReplicas(handle) for name, handle in models.items()}, settings, name)

    async def ask(self, request: HttpRequest) -> HttpAnswer:
        """Answer without HTTP, for whoever has a handle: other applications of the cluster, tests."""
        return await answer_of(messages_of(self.front, request))

    async def drain(self) -> int:
        """Take no more requests for pictures; says how many are still under way."""
        return self.front.drain()


def make_entrance() -> Any:
    """The class of the deployment; Ray is imported only now."""
    from ray import serve

    return serve.ingress(_Doorway())(_Entrance)
