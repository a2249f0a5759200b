"""A batch on Ray Data: the same files, drawn by replicas that share the output folder."""

import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from emag_export.bundle import Bundle
from emag_export.engines.config import EngineConfig
from emag_export.engines.registry import open_backend
from emag_export.errors import InputError
from emag_export.records import parse_record
from emag_export.runtime.batching.options import BatchingOptions
from emag_export.runtime.batching.pipeline import BatchedPipeline
from emag_export.runtime.pipeline import Pipeline
from emag_export.runtime.request import GenerationRequest
from emag_export.serve.batch.draw import BatchResult, Tell, draw
from emag_export.serve.batch.plan import Drawable, Item
from emag_export.serve.batch.table import Row

__all__ = ["Workers", "draw_on_ray"]

_BLOCK = 16
"""Pictures that a replica takes at a time; a call takes fewer or as many."""


@dataclass(frozen=True, kw_only=True)
class Workers:
    """Who draws."""

    engine: EngineConfig
    """How each opens components."""
    batching: BatchingOptions
    """How many images share a call."""
    on_ray: bool = False
    """On replicas of a Ray cluster; otherwise in this process, and what follows does not count."""
    replicas: int | None = None
    """None is one per GPU, or one."""
    address: str | None = None
    """Of a Ray cluster that runs; None starts one on this machine."""


class _Replica:
    """Draws blocks of pictures with engines of its own.

    Args:
        bundle: Folder.
        output: Folder of the batch.
        engine: How components are opened.
        batching: How many images share a call.
    """

    def __init__(self, bundle: str, output: str, engine: EngineConfig, batching: BatchingOptions) -> None:
        opened = Bundle(bundle)
        self._output = Path(output)
        self._batched = BatchedPipeline(Pipeline(opened, open_backend(engine, opened)), batching)

    def __call__(self, block: Mapping[str, Any]) -> Mapping[str, Any]:
        """Draw pictures; what failed is answered with its error."""
        items = [_item_of(json.loads(text)) for text in block["item"]]
        result = BatchResult()
        draw(iter(items), self._output, self._batched, result)
        errors = {item.path.as_posix(): error for item, error in result.failed}
        return {"item": block["item"], "error": [errors.get(item.path.as_posix(), "") for item in items]}


def draw_on_ray(
    todo: Iterator[Item],
    plan: Drawable,
    workers: Workers,
    *,
    result: BatchResult,
    tell: Tell = lambda done: None,
) -> None:
    """Draw pictures on replicas.

    Args:
        todo: Of ``pending``. The list of what is to be drawn lies in this process's memory.
        plan: Bundle and output folder; every machine sees both under the same path.
        workers: Who draws.
        result: Counts what became of the pictures.
        tell: Told of progress.

    Raises:
        InputError: If there is no cluster at that address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    options = {} if workers.address else {"include_dashboard": False}
    try:
        ray.init(
            # Not None, which would take whatever cluster happens to run here.
            address=workers.address or "local",
            log_to_driver=False,
            logging_level="ERROR",
            **options,
        )
    except ConnectionError as error:
        raise InputError(
            f"no Ray cluster answers at `ray_address` {workers.address}; "
            "start one with ray start, or leave it out"
        ) from error
    try:
        items = [{"item": _text_of(item)} for item in todo]
        if not items:
            return
        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        gpus = int(ray.cluster_resources().get("GPU", 0)) if workers.engine.device.startswith("cuda") else 0
        folders = (str(plan.bundle.path.resolve()), str(plan.output.resolve()))
        replicas = workers.replicas or gpus or 1
        drawn = ray.data.from_items(items, override_num_blocks=-(-len(items) // _BLOCK)).map_batches(
            _Replica,
            fn_constructor_args=(*folders, workers.engine, workers.batching),
            compute=ray.data.ActorPoolStrategy(size=replicas),
            batch_size=_BLOCK,
            num_cpus=workers.engine.threads or 1,
            num_gpus=1 if gpus else None,
        )
        for row in drawn.iter_rows():
            if row["error"]:
                result.failed.append((_item_of(json.loads(row["item"])), row["error"]))
            else:
                result.drawn += 1
            tell(result.drawn + result.kept + len(result.failed))
    finally:
        ray.shutdown()


def _text_of(item: Item) -> str:
    row, request = item.row, asdict(item.request)
    return json.dumps(
        {"row": row.number, "image": item.image, "path": item.path.as_posix(), "request": request}
    )


def _item_of(data: Mapping[str, Any]) -> Item:
    request = parse_record(GenerationRequest, data["request"], name="a request", remedy="draw it again")
    row = Row(number=data["row"], prompt=request.prompt, keywords={}, others={})
    return Item(row=row, image=data["image"], request=request, path=Path(data["path"]))
