"""``1/model.py`` of the Triton repository, with a stand-in for the module that Triton brings."""

import json
import sys
from importlib import import_module
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from emag_export.bundle import Bundle
from emag_export.engines.config import EngineConfig
from emag_export.runtime.pipeline import Pipeline
from emag_export.serve.triton.export import export_repository
from emag_export.serve.triton.parameters import Limits, as_parameters

PROMPT = "a large red circle on a blue background"
RESCHEDULE = 2


class Request:
    """Like Triton's, as far as the model uses it."""

    def __init__(self, number: int, **inputs: Any) -> None:
        self.number, self.cancelled, self.flags = number, False, 0
        self.inputs: dict[str, Any] = {}
        for name, value in inputs.items():
            given = value.encode() if isinstance(value, str) else value
            kind = np.object_ if isinstance(given, bytes) else None
            values = list(given) if isinstance(given, tuple) else [given]
            self.inputs[name] = np.array([values], dtype=kind)

    def correlation_id(self) -> int:
        return self.number

    def is_cancelled(self) -> bool:
        return self.cancelled

    def set_release_flags(self, flags: int) -> None:
        self.flags = flags


class Error:
    """Like Triton's."""

    INVALID_ARG, CANCELLED, INTERNAL = "invalid", "cancelled", "internal"

    def __init__(self, message: str, code: str) -> None:
        self.message, self.code = message, code


def _response(output_tensors: Any = (), error: Error | None = None) -> SimpleNamespace:
    return SimpleNamespace(outputs=list(output_tensors), error=error)


def _input(request: Request, name: str) -> SimpleNamespace | None:
    found = request.inputs.get(name)
    return None if found is None else SimpleNamespace(as_numpy=lambda: found)


@pytest.fixture
def model(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    stand_in = SimpleNamespace(
        TritonError=Error,
        InferenceResponse=_response,
        Tensor=lambda name, value: (name, value),
        TRITONSERVER_REQUEST_RELEASE_RESCHEDULE=RESCHEDULE,
        get_input_tensor_by_name=_input,
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", stand_in)
    monkeypatch.delitem(sys.modules, "emag_export.serve.triton.model", raising=False)
    bundle, engine = Bundle(tiny_bundle), EngineConfig(threads=1)
    folder = export_repository(bundle, tmp_path / "repo", engine)
    given = as_parameters(engine, Limits.of(bundle))
    parameters = {name: {"string_value": value} for name, value in given.items()}
    config = json.dumps({"max_batch_size": 4, "parameters": parameters})
    made = import_module("emag_export.serve.triton.model").TritonPythonModel()
    made.initialize({"model_config": config, "model_repository": str(folder), "model_version": "1"})
    yield made
    made.finalize()
    sys.modules.pop("emag_export.serve.triton.model", None)


def run(model: Any, *requests: Request) -> list[SimpleNamespace]:
    """Call the model as Triton does, until nobody wants to be called again."""
    answers: dict[Request, SimpleNamespace] = {}
    for _ in range(100):
        waiting = [request for request in requests if request not in answers]
        if not waiting:
            return [answers[request] for request in requests]
        for request in waiting:
            request.flags = 0
        for request, answer in zip(waiting, model.execute(waiting), strict=True):
            assert (answer is None) == (request.flags == RESCHEDULE), "either answered or called again"
            if answer is not None:
                answers[request] = answer
    raise AssertionError("a request is called again for ever")


def pixels(answer: SimpleNamespace) -> np.ndarray[Any, Any]:
    """Of a picture."""
    assert answer.error is None, answer.error.message
    ((name, tensor),) = answer.outputs
    assert name == "PNG"
    return np.asarray(Image.open(BytesIO(tensor[0, 0])).convert("RGB")).astype(int)


def test_a_client_that_takes_the_number_of_another_gets_its_own_picture(
    model: Any, tiny_bundle: Path
) -> None:
    one, other = (Request(7, PROMPT=PROMPT, SEED=seed, STEPS=3) for seed in (1, 2))
    first, second = run(model, one, other)
    with Pipeline.open(tiny_bundle, threads=1) as pipeline:
        for answer, seed in ((first, 1), (second, 2)):
            (alone,) = pipeline.generate(PROMPT, seed=seed, steps=3)
            assert np.abs(pixels(answer) - np.asarray(alone)).max() <= 1


def test_everything_that_generate_takes_can_be_sent(model: Any, tiny_bundle: Path) -> None:
    given: dict[str, Any] = {"seed": 1, "steps": 4, "guidance_interval": (0.25, 1.0), "emag_blocks": (4,)}
    given |= {"cfg_zero_star": True, "cfg_rescale": 0.5, "emag_delta": 0}
    inputs = {name.upper(): value for name, value in given.items()}
    answer, plain = run(
        model, Request(1, PROMPT=PROMPT, **inputs), Request(2, PROMPT=PROMPT, SEED=1, STEPS=4)
    )
    with Pipeline.open(tiny_bundle, threads=1) as pipeline:
        (alone,) = pipeline.generate(PROMPT, **given)
    assert np.abs(pixels(answer) - np.asarray(alone)).max() <= 1
    assert np.abs(pixels(answer) - pixels(plain)).max() > 8, "the inputs change nothing"


def test_what_cannot_be_read_harms_nobody(model: Any) -> None:
    good = Request(1, PROMPT=PROMPT, STEPS=2)
    bad = {
        "the input NEGATIVE_PROMPT is not UTF-8": Request(2, PROMPT=PROMPT, NEGATIVE_PROMPT=b"\xff\xfe"),
        "the input PROMPT is missing": Request(3),
        "STEPS is 5000; give at most 100": Request(4, PROMPT=PROMPT, STEPS=5000),
        "there is no GUIDANCE 'more'": Request(5, PROMPT=PROMPT, GUIDANCE="more"),
        "GUIDANCE_SCALE is nan": Request(6, PROMPT=PROMPT, GUIDANCE_SCALE=float("nan")),
    }
    answer, *refusals = run(model, good, *bad.values())
    assert pixels(answer).shape == (64, 64, 3)
    for said, refusal in zip(bad, refusals, strict=True):
        assert said in refusal.error.message and refusal.error.code == Error.INVALID_ARG


def test_requests_that_were_given_up_are_answered(model: Any) -> None:
    before, during = (Request(number, PROMPT=PROMPT, STEPS=50) for number in (1, 2))
    before.cancelled = True
    assert model.execute([during]) == [None]
    during.cancelled = True
    answers = run(model, before, during)
    assert [answer.error.code for answer in answers] == [Error.CANCELLED] * 2
    assert model._backend._scheduler.live == 0
