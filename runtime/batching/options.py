"""How many images a batched pipeline takes at once, and where that number comes from."""

from dataclasses import dataclass
from math import prod

from emag_export.engines.protocol import TORCH_DTYPES
from emag_export.errors import InputError
from emag_export.progress import Progress, silent
from emag_export.runtime.batching.banks import Room
from emag_export.runtime.batching.call_times import (
    COUNTS,
    CallTimes,
    measure_call_times,
    save_call_times,
    stored_call_times,
)
from emag_export.runtime.batching.policy import policy_of
from emag_export.runtime.pipeline import Pipeline
from emag_export.runtime.request import any_prompt, default_request
from emag_export.runtime.sampling.plan import Plan
from emag_export.runtime.sampling.state import state_shape

__all__ = ["BatchingOptions", "Sizing", "room_for", "size_room"]

_PROMPT = "a picture"
"""For measuring; its text does not matter, its length is always the same."""
_STATE_BUDGET = 2 << 30
"""Bytes of averages that images may hold who only wait for their bank's turn."""


@dataclass(frozen=True, kw_only=True)
class BatchingOptions:
    """What can be chosen about sharing calls."""

    images_per_call: int | None = None
    """At most; None takes as many as pay, which is measured."""
    live_images: int | None = None
    """Images that are denoised at the same time; those beyond one call take turns. None takes twice a call's,
    at least four, as far as their averages stay small."""
    policy: str = "fifo"
    """A name in :data:`~emag_export.runtime.batching.policy.POLICIES`."""
    queue_images: int = 64
    """Images that may wait."""
    stall_seconds: float = 60.0
    """Without a finished step for so long, while there is work, something is wrong."""
    threads: int = 0
    """CPU threads of the engine, for the record of call times."""

    def __post_init__(self) -> None:
        policy_of(self.policy)
        for name in ("images_per_call", "live_images"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"`{name}` is {value}; give 1 or more")
        if self.queue_images < 0:
            raise InputError(f"`queue_images` is {self.queue_images}; give 0 or more")


@dataclass(frozen=True, kw_only=True)
class Sizing:
    """How many images there is room for."""

    room: Room
    seconds_per_step: float
    """Of one image in a full call, by the table."""
    call_times: CallTimes
    kept: bool
    """Whether the table lies beside the bundle, so that the next start need not measure."""


def size_room(pipeline: Pipeline, options: BatchingOptions, progress: Progress = silent) -> Sizing:
    """Measure calls, unless a table of this engine is kept beside the bundle, and choose from them.

    Args:
        pipeline: Nobody else may use it meanwhile.
        options: What was chosen already.
        progress: Told of every measurement.

    Raises:
        EngineError: If the engine fails.
        InputError: If fewer live images than images per call were asked for.
    """
    request = default_request(pipeline.bundle, any_prompt(pipeline.bundle, _PROMPT))
    prepared = pipeline.prepare([request])
    size = (request.height, request.width)
    path, table = stored_call_times(pipeline.bundle, pipeline.denoiser, size, options.threads)
    kept = table is not None
    if table is None:
        table = measure_call_times(
            pipeline.bundle,
            pipeline.denoiser,
            prepared,
            most=options.images_per_call or COUNTS[-1],
            threads=options.threads,
            progress=progress,
        )
        # One that ends early would say nothing to a server that may choose.
        kept = options.images_per_call is None and save_call_times(path, table)
    contract = pipeline.bundle.contract
    itemsize = TORCH_DTYPES[contract.state_dtype].itemsize
    state = 2 * prod(state_shape(contract, prepared.latents, prepared.conditioning.given)) * itemsize
    room = room_for(table, prepared.plan, options, state_bytes=state)
    run = table.run_seconds(prepared.plan, room.per_call)
    return Sizing(
        room=room,
        seconds_per_step=run / len(prepared.plan.steps) / room.per_call,
        call_times=table,
        kept=kept,
    )


def room_for(table: CallTimes, plan: Plan, options: BatchingOptions, *, state_bytes: int) -> Room:
    """How many images there is room for.

    Args:
        table: Of the engine.
        plan: Of a typical request.
        options: What was chosen already.
        state_bytes: Of one image's averages, both buffers; 0 where nothing is averaged.

    Raises:
        InputError: If fewer live images than images per call were asked for.
    """
    per_call = options.images_per_call or table.most_that_pay(plan)
    taking_turns = max(per_call, 4 - per_call)
    if state_bytes:  # some negatives keep nothing
        taking_turns = min(taking_turns, _STATE_BUDGET // state_bytes)
    return Room(per_call=per_call, live=options.live_images or per_call + taking_turns)
