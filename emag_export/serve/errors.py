"""Errors as the OpenAI API writes them, ``{"error": {message, type, param, code}}``, in the API's words."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from emag_export.errors import (
    PARAMETER,
    BundleError,
    CancelledError,
    DeadlineError,
    EmagError,
    InputError,
    QueueFullError,
    UnavailableError,
)

__all__ = ["FIELDS", "OF_GUIDANCE", "ApiError", "api_error", "field_of"]

OF_GUIDANCE = (
    "embedded_guidance",
    "guidance_interval",
    "cfg_rescale",
    "cfg_zero_star",
    "cfg_zero_init",
    "tcfg",
    "guided_channels",
    "random_blocks",
    "blur_sigma",
)
"""Parameters of the library that are fields of a request's ``emag`` by the same name."""

FIELDS: Mapping[str, str] = MappingProxyType(
    {
        "images": "n",
        "height": "size",
        "width": "size",
        "steps": "num_inference_steps",
        **{
            f"emag_{name}": f"emag.{name}"
            for name in ("scale", "beta", "start", "delta", "stop", "strength", "unit", "blocks")
        },
        **{name: f"emag.{name}" for name in ("guidance", *OF_GUIDANCE)},
    }
)
"""Parameter of the library to the field of a request, where the two have different names."""

_OWN_WORDS = ("seed", "prompt", "negative_prompt", "guidance_scale", *FIELDS)


class ApiError(Exception):
    """An answer that is no picture.

    Args:
        status: Of HTTP.
        message: For people.
        param: Field of the request that it is about.
        code: For programs.
        retry_after: Seconds, where trying again later helps.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """Of the answer."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Of the answer."""
        headers = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(max(1, round(self.retry_after)))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers


_TYPES = {
    401: "authentication_error",
    429: "rate_limit_error",
    503: "service_unavailable",
    504: "timeout",
}


def field_of(parameter: str) -> str:
    """Field of a request that sets a parameter of the library."""
    return FIELDS.get(parameter, parameter)


def api_error(error: EmagError, *, model: str, path: str) -> ApiError:
    """One of the library's errors as an answer: no path, nothing that a library said.

    Args:
        error: What happened.
        model: Name of the model.
        path: Of its bundle; it is not shown.
    """
    if isinstance(error, QueueFullError):
        return ApiError(429, error.message, code="queue_full", retry_after=error.retry_after)
    if isinstance(error, UnavailableError):
        return ApiError(503, error.message, code="not_ready")
    if isinstance(error, DeadlineError):
        return ApiError(504, error.message, param="emag.deadline", code="deadline_exceeded")
    if isinstance(error, CancelledError):
        return ApiError(409, error.message, code="cancelled")
    if isinstance(error, InputError):
        words = PARAMETER.sub(lambda match: f"'{field_of(match[1])}'", error.message.replace(path, model))
        named = [name for name in error.parameters if name in _OWN_WORDS]
        return ApiError(400, words, param=field_of(named[0]) if named else None, code="invalid_value")
    if isinstance(error, BundleError):
        return ApiError(500, f"the model {model} cannot do this: its bundle is incomplete", code="bundle")
    return ApiError(500, "the engine failed and this picture was given up; try again", code="engine_failure")
