"""The OpenAPI document: what FastAPI knows of the routes, and what it cannot know of their answers."""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from emag_export.serve.schemas import Completed, ErrorBody, PartialImage

__all__ = ["document"]

_GENERATIONS = "/v1/images/generations"
_REFUSALS: Mapping[str, tuple[int, ...]] = {
    _GENERATIONS: (400, 404, 408, 409, 413, 415, 429, 500, 503, 504),
    "/v1/models/{name}": (404,),
    "/v1/requests/{request_id}": (404,),
}
"""Path to the statuses of its errors, beside 401, which every guarded one has."""
_WORDS = {
    400: "Something cannot be done as it was asked for; param says which field.",
    401: "No valid key.",
    404: "There is none of that name.",
    408: "The body came too slowly.",
    409: "It was given up, or its x-request-id is known already.",
    413: "The body is too large.",
    415: "The body is compressed.",
    429: "Too much is under way; Retry-After says when to come again.",
    500: "The engine failed.",
    503: "Not ready, or about to end; Retry-After says when to come again.",
    504: "The deadline passed.",
}
_OPEN = "/health/"
_STREAM = (
    "Server-sent events, each 'event: NAME' and 'data: JSON', with an empty line behind. NAME is "
    "image_generation.partial_image (data: PartialImage), image_generation.completed (data: Completed, one a "
    "picture), or error (data: ErrorBody), which is the last one. Lines that begin with a colon mean nothing."
)


def document(app: FastAPI, *, guarded: bool) -> dict[str, Any]:
    """The document of an app.

    Args:
        app: With all its routes.
        guarded: Whether keys are needed.
    """
    found = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    schemas = found["components"]["schemas"]
    # What FastAPI writes for errors of validation, and this server never sends.
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    for model in (PartialImage, Completed, ErrorBody):
        _add(schemas, model)
    for path, operations in found["paths"].items():
        for operation in operations.values():
            answers = operation["responses"]
            answers.pop("422", None)
            closed = guarded and not path.startswith(_OPEN)
            for status in (*_REFUSALS.get(path, ()), *((401,) if closed else ())):
                answers[str(status)] = _error(status)
            if closed:
                operation["security"] = [{"key": []}]
    ok = found["paths"][_GENERATIONS]["post"]["responses"]["200"]
    ok["content"]["text/event-stream"] = {"schema": {"type": "string", "description": _STREAM}}
    if guarded:
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return found


def _add(schemas: dict[str, Any], model: type[BaseModel]) -> None:
    schema = model.model_json_schema(mode="serialization", ref_template="#/components/schemas/{model}")
    schemas |= schema.pop("$defs", {})
    schemas[model.__name__] = schema


def _error(status: int) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}}
    return {"description": _WORDS[status], "content": content}
