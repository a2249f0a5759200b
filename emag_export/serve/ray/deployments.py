"""The application that Ray Serve runs: a front, and a deployment per bundle.

Every bundle is a deployment of its own, whose replicas have one engine each. A model that nobody asks for
takes nothing from the others, each is scaled by its own queue, and no request waits for a model to load;
Ray's model multiplexing would load and drop models inside replicas while requests wait. The front reads which
model a request is for.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from emag_export.engines.config import EngineConfig
from emag_export.errors import InputError
from emag_export.runtime.batching.options import BatchingOptions
from emag_export.serve.models import name_of
from emag_export.serve.ray.sizing import Cluster, RayOptions, ReplicaPlan
from emag_export.serve.settings import ServerSettings

__all__ = ["make_application"]

_FRONT_REQUESTS = 4000
"""That a front has open at once; they wait in it and cost little."""
_MARGIN = 64
"""Requests that a replica takes beside those for pictures: models, states, figures."""
_TRIES = 3
"""Of starting a replica, before its model counts as failed."""


def make_application(
    bundles: Sequence[Path],
    settings: ServerSettings,
    engine: EngineConfig,
    batching: BatchingOptions,
    options: RayOptions,
) -> Any:
    """A front, and a deployment per bundle, sized for the cluster as it is now.

    Args:
        bundles: Folders that ``build`` wrote.
        settings: Limits and keys.
        engine: How components are opened.
        batching: How many images share calls.
        options: How many replicas.

    Returns:
        Ray Serve's ``Application``.

    Raises:
        InputError: If two bundles have the same name, or the cluster has no GPU for an engine that needs one.
    """
    from ray import serve

    from emag_export.serve.ray.entrance import make_entrance
    from emag_export.serve.ray.replica import ModelReplica

    names = [name_of(path) for path in bundles]
    if doubled := [name for name in names if names.count(name) > 1]:
        raise InputError(f"two bundles are called {doubled[0]}; requests name them by folder: rename one")
    plan = ReplicaPlan.of(Cluster.now(), engine, options, len(names))
    common = _common(settings)
    model = serve.deployment(
        ray_actor_options=plan.resources,
        max_ongoing_requests=settings.max_requests + _MARGIN,
        max_queued_requests=settings.max_requests,
        health_check_period_s=5.0,
        **plan.scaling,
        **common,
    )(ModelReplica)
    front = serve.deployment(
        name="front",
        num_replicas=options.fronts,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=_FRONT_REQUESTS,
        **common,
    )(make_entrance())
    # Keys are checked at the front; replicas get none.
    within = replace(settings, api_keys=(), insecure=True)
    of_engine = plan.of_engine(engine, batching)
    models = {
        name: model.options(name=f"model-{name}").bind(path.resolve(), within, *of_engine)
        for name, path in zip(names, bundles, strict=True)
    }
    return front.bind(settings, models)


def _common(settings: ServerSettings) -> dict[str, Any]:
    """Options of both kinds of deployments."""
    return {
        "graceful_shutdown_timeout_s": settings.drain_timeout,
        "graceful_shutdown_wait_loop_s": 0.5,
        "max_constructor_retry_count": _TRIES,
        # The app writes a line per request itself.
        "logging_config": {"encoding": settings.log_format.upper(), "enable_access_log": False},
    }
