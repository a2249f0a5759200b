"""Triton's side: copied into the repository as ``1/model.py``, where its python backend finds it.

Every request is a sequence of its own that Triton calls again and again (``iterative_sequence``) until its
picture is finished; one call takes all live pictures one step further.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]  # Triton brings it

from emag_export.engines.config import EngineConfig
from emag_export.errors import EmagError, InputError
from emag_export.serve.triton.backend import StepBackend
from emag_export.serve.triton.fields import FIELDS, PICTURE, PROMPT, in_inputs

__all__ = ["TritonPythonModel"]


class TritonPythonModel:
    """Names and arguments are those of Triton's python backend."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the bundle that lies beside this file."""
        config = json.loads(args["model_config"])
        given = {name: value["string_value"] for name, value in config["parameters"].items()}
        folder = Path(args["model_repository"]) / args["model_version"] / "bundle"
        engine = EngineConfig(backend=given["backend"], device=given["device"], threads=int(given["threads"]))
        self._backend = StepBackend(folder, engine, int(config["max_batch_size"]))

    def execute(self, requests: list[Any]) -> list[Any]:
        """One step of everything; requests whose pictures are not finished are called again."""
        refused: dict[str, str] = {}
        for request in requests:
            key = str(request.correlation_id())
            if request.is_cancelled():
                self._backend.cancel(key)
            elif key not in self._backend:
                try:
                    self._backend.start(key, *_read(request))
                except EmagError as error:
                    refused[key] = error.message
        self._backend.step()
        return [self._answer(request, refused) for request in requests]

    def finalize(self) -> None:
        """Free the engines."""
        self._backend.close()

    def _answer(self, request: Any, refused: dict[str, str]) -> Any:
        key = str(request.correlation_id())
        if key in refused:
            error = pb_utils.TritonError(in_inputs(refused[key]), pb_utils.TritonError.INVALID_ARG)
            return pb_utils.InferenceResponse(error=error)
        found = self._backend.take(key)
        if found is None:
            request.set_release_flags(pb_utils.TRITONSERVER_REQUEST_RELEASE_RESCHEDULE)
            return None
        if isinstance(found, EmagError):
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(found.message))
        tensor = pb_utils.Tensor(PICTURE, np.array([[found]], dtype=np.object_))
        return pb_utils.InferenceResponse(output_tensors=[tensor])


def _read(request: Any) -> tuple[str, dict[str, Any]]:
    prompt = _value(request, PROMPT)
    if not isinstance(prompt, str):
        raise InputError(f"the input {PROMPT} is missing; send what to draw")
    given = {field.keyword: _value(request, name) for name, field in FIELDS.items()}
    return prompt, {keyword: value for keyword, value in given.items() if value is not None}


def _value(request: Any, name: str) -> Any:
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        return None
    value = tensor.as_numpy().reshape(-1)[0]
    return value.decode("utf-8") if isinstance(value, bytes) else value.item()
