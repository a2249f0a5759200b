"""Who draws many pictures: this process, or replicas of a Ray cluster; for ``batch`` and ``eval``."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click
from cloup import option

from emag_export.cli.options import engine_config, group

if TYPE_CHECKING:
    from emag_export.serve.batch.on_ray import Workers

__all__ = ["ray_options", "workers_of"]

ray_options = group(
    "Ray",
    option("--ray", is_flag=True, help="Draw on replicas of a Ray cluster; they share the output folder."),
    option("--replicas", type=click.IntRange(1), help="Replicas there. Default: one per GPU, or one."),
    option("--ray-address", help="Of a cluster that runs. Default: one on this machine."),
)
"""Whether they are replicas, and where."""


def workers_of(options: Mapping[str, Any]) -> "Workers":
    """What these options, ``--images-per-call`` and those of engines ask for."""
    from emag_export.runtime.batching.options import BatchingOptions
    from emag_export.serve.batch.on_ray import Workers

    engine = engine_config(dict(options))
    return Workers(
        engine=engine,
        batching=BatchingOptions(images_per_call=options["images_per_call"], threads=engine.threads),
        on_ray=options["ray"],
        replicas=options["replicas"],
        address=options["ray_address"],
    )
