"""Triton's side: copied into the repository as ``1/model.py``, where its python backend finds it.

Every request is a sequence of its own that Triton calls again and again (``iterative_sequence``) until its
picture is finished; one call takes all live pictures one step further.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]  # Triton brings it

from emag_export.errors import CancelledError, EmagError, InputError
from emag_export.serve.triton.backend import StepBackend
from emag_export.serve.triton.fields import FIELDS, PICTURE, PROMPT, in_inputs
from emag_export.serve.triton.parameters import engine_of, limits_of

__all__ = ["TritonPythonModel"]


class TritonPythonModel:
    """Names and arguments are those of Triton's python backend."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the bundle that lies beside this file."""
        config = json.loads(args["model_config"])
        given = {name: value["string_value"] for name, value in config["parameters"].items()}
        folder = Path(args["model_repository"]) / args["model_version"] / "bundle"
        images = int(config["max_batch_size"])
        self._backend = StepBackend(folder, engine_of(given), images, limits_of(given))

    def execute(self, requests: list[Any]) -> list[Any]:
        """One step of everything; requests whose pictures are not finished are called again."""
        found = [self._take_up(request) for request in requests]
        self._backend.step()
        return [self._answer(*pair) for pair in zip(requests, found, strict=True)]

    def finalize(self) -> None:
        """Free the engines."""
        self._backend.close()

    def _take_up(self, request: Any) -> tuple[Any, ...] | EmagError:
        """Key of the picture of a request, or why there will be none."""
        try:
            prompt, keywords = _read(request)
            # Triton's number alone will not do: a client may choose one that somebody else has.
            key = (str(request.correlation_id()), prompt, *sorted(keywords.items()))
            if request.is_cancelled():
                if key not in self._backend:
                    return CancelledError("the picture was given up before it was begun")
                self._backend.cancel(key)
            elif key not in self._backend:
                self._backend.start(key, prompt, keywords)
        except EmagError as error:
            return error
        return key

    def _answer(self, request: Any, found: tuple[Any, ...] | EmagError) -> Any:
        end = found if isinstance(found, EmagError) else self._backend.take(found)
        if end is None:
            request.set_release_flags(pb_utils.TRITONSERVER_REQUEST_RELEASE_RESCHEDULE)
            return None
        if isinstance(end, EmagError):
            return pb_utils.InferenceResponse(error=_error(end))
        tensor = pb_utils.Tensor(PICTURE, np.array([[end]], dtype=np.object_))
        return pb_utils.InferenceResponse(output_tensors=[tensor])


def _error(error: EmagError) -> Any:
    codes = {InputError: pb_utils.TritonError.INVALID_ARG, CancelledError: pb_utils.TritonError.CANCELLED}
    code = codes.get(type(error), pb_utils.TritonError.INTERNAL)
    return pb_utils.TritonError(in_inputs(error.message), code)


def _read(request: Any) -> tuple[str, dict[str, Any]]:
    (prompt,) = _values(request, PROMPT) or (None,)
    if not isinstance(prompt, str):
        raise InputError(f"the input {PROMPT} is missing; send what to draw")
    given = {name: _values(request, name) for name in FIELDS}
    return prompt, {
        FIELDS[name].keyword: values if FIELDS[name].count != 1 else values[0]
        for name, values in given.items()
        if values
    }


def _values(request: Any, name: str) -> tuple[Any, ...]:
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        return ()
    try:
        return tuple(
            value.decode("utf-8") if isinstance(value, bytes) else value
            for value in tensor.as_numpy().reshape(-1).tolist()
        )
    except UnicodeDecodeError:
        raise InputError(f"the input {name} is not UTF-8; encode its text so") from None
