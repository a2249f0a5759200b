"""The playground: one static page, its files in this package, nothing from elsewhere."""

from pathlib import Path

from starlette.responses import FileResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

__all__ = ["CONTENT_POLICY", "STATIC", "page_routes"]

STATIC = Path(__file__).parent / "static"
CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; font-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": CONTENT_POLICY,
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class _Files(StaticFiles):
    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(_HEADERS)
        return response


async def _index(request: object) -> Response:
    return FileResponse(STATIC / "index.html", headers=_HEADERS)


def page_routes() -> list[BaseRoute]:
    """The page at ``/``, its files below ``/static``."""
    return [Route("/", _index), Mount("/static", _Files(directory=STATIC))]
