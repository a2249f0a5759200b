"""The OpenAPI document is true: generated requests, right and wrong, get answers that it describes."""

from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.core.result import Err

from emag_export.engines.config import EngineConfig
from emag_export.runtime.batching.options import BatchingOptions
from emag_export.serve.app import create_app
from emag_export.serve.metrics import Metrics
from emag_export.serve.models import open_models
from emag_export.serve.settings import ServerSettings

load_all_checks()
_CHECKS = [
    check
    for check in CHECKS.get_all()
    if check.__name__
    in (
        "not_a_server_error",
        "status_code_conformance",
        "content_type_conformance",
        "response_schema_conformance",
        "negative_data_rejection",
        "unsupported_method",
    )
]


@pytest.fixture(scope="module")
def api(tiny_bundle: Path) -> schemathesis.BaseSchema:
    metrics = Metrics()
    batching = BatchingOptions(images_per_call=2, live_images=2, threads=1)
    models = open_models([tiny_bundle], EngineConfig(threads=1), batching, metrics)
    # Small limits, so that requests that are right are drawn at once.
    limits = ServerSettings(max_images=1, max_steps=2, max_pixels=64 * 64, deadline=20)
    return schemathesis.openapi.from_asgi("/openapi.json", create_app(models, limits, metrics))


def test_answers_are_what_the_document_says(api: schemathesis.BaseSchema) -> None:
    """Wrong methods, bodies, fields and values of every operation, and right ones."""
    seen = set()
    for found in api.get_all_operations():
        assert not isinstance(found, Err), found
        operation = found.ok()
        seen.add(operation.label)
        # GETs without a body are soon exhausted.
        examples = 60 if operation.method.upper() == "POST" else 8

        @given(case=operation.as_strategy(generation_mode=GenerationMode.NEGATIVE) | operation.as_strategy())
        @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
        def check(case: schemathesis.Case[Any]) -> None:
            case.call_and_validate(checks=_CHECKS)  # type: ignore[arg-type]

        check()
    assert {"POST /v1/images/generations", "DELETE /v1/requests/{request_id}", "GET /metrics"} <= seen


def test_the_checks_are_there() -> None:
    assert len(_CHECKS) == 6
