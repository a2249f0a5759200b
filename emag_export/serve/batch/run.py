"""Draw what is not there yet: in this process, or on replicas of a Ray cluster."""

from itertools import chain

from emag_export.engines.registry import open_backend
from emag_export.progress import Progress, silent
from emag_export.runtime.batching.options import size_room
from emag_export.runtime.batching.pipeline import BatchedPipeline
from emag_export.runtime.pipeline import Pipeline
from emag_export.serve.batch.draw import BatchResult, Tell, draw, pending, remove_leftovers
from emag_export.serve.batch.on_ray import Workers, draw_on_ray
from emag_export.serve.batch.plan import Drawable

__all__ = ["run_batch"]


def run_batch(
    plan: Drawable,
    workers: Workers,
    *,
    overwrite: bool = False,
    tell: Tell = lambda done: None,
    progress: Progress = silent,
) -> BatchResult:
    """Draw all pictures that are not there; where none is missing, no engine is opened.

    Args:
        plan: What is wanted, checked already.
        workers: Who draws.
        overwrite: Draw pictures anew that were made otherwise.
        tell: Told how many pictures are there.
        progress: Told of what is measured before the first picture.

    Raises:
        InputError: If a picture was made otherwise and may not be overwritten; or if there is no cluster.
        EngineError: If the engine cannot be opened.
    """
    plan.output.mkdir(parents=True, exist_ok=True)
    remove_leftovers(plan.output)
    result = BatchResult()
    todo = pending(plan, result, overwrite=overwrite)
    first = next(todo, None)
    if first is None:
        tell(result.kept)
        return result
    todo = chain([first], todo)
    if workers.on_ray:
        draw_on_ray(todo, plan, workers, result=result, tell=tell)
        return result
    pipeline = Pipeline(plan.bundle, open_backend(workers.engine, plan.bundle))
    sizing = size_room(pipeline, workers.batching, progress)
    with BatchedPipeline(pipeline, workers.batching, sizing=sizing) as batched:
        draw(todo, plan.output, batched, result, tell)
    return result
