"""The step scheduler on a virtual clock: what a load would meet on another machine, or on several replicas.

It is the scheduler itself that runs, on an engine that computes nothing; every call takes the time that a
table says (:class:`~emag_export.runtime.batching.call_times.CallTimes`). What is not in the table, text,
decoding and HTTP, is one number per picture.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from benchmarks.serving.traffic import Arrival, Served
from emag_export.contract import DenoiserContract
from emag_export.engines.function import FunctionEngine
from emag_export.engines.protocol import TORCH_DTYPES
from emag_export.runtime.batching.banks import Room
from emag_export.runtime.batching.call_times import CallTimes
from emag_export.runtime.batching.job import Finished, Job, JobEvent, Urgency
from emag_export.runtime.batching.scheduler import Call, StepScheduler
from emag_export.runtime.prepare import Prepared
from emag_export.runtime.request import GenerationRequest
from emag_export.runtime.sampling.conditioning import Conditioning
from emag_export.runtime.sampling.plan import Plan
from emag_export.shapes import evaluate, symbols

__all__ = ["Machine", "simulate"]

PlanOf = Callable[[Arrival], Plan]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What serves."""

    table: CallTimes
    room: Room
    picture_seconds: float = 0.0
    """Of one picture outside its calls: text, decoding, HTTP."""
    beside: bool = True
    """Whether that goes on beside the calls, as on a machine with a GPU, or takes their processor's time."""
    overhead: float = 0.0
    """Of the scheduler, seconds a call."""
    replicas: int = 1


@dataclass(kw_only=True, eq=False)
class _Replica:
    """One scheduler and its own time."""

    scheduler: StepScheduler
    calls: list[Call]
    now: float = 0.0
    done: list[Arrival] = field(default_factory=list)

    @property
    def images(self) -> int:
        return self.scheduler.live + self.scheduler.waiting


def simulate(
    contract: DenoiserContract, plan_of: PlanOf, arrivals: Sequence[Arrival], machine: Machine
) -> list[Served]:
    """Serve requests on a virtual clock; each goes to the replica with the fewest images.

    Args:
        contract: Of the bundle.
        plan_of: The run of a request.
        arrivals: In the order of their time.
        machine: What serves.
    """
    replicas = [_replica(contract, machine.room) for _ in range(machine.replicas)]
    pending, served = list(arrivals), list[Served]()
    while pending or any(replica.images for replica in replicas):
        busy = min((r for r in replicas if r.images), key=lambda replica: replica.now, default=None)
        if pending and (busy is None or pending[0].at <= busy.now):
            _arrive(min(replicas, key=lambda replica: replica.images), pending.pop(0), contract, plan_of)
        elif busy is not None:
            served += _call(busy, machine)
    return served


def _replica(contract: DenoiserContract, room: Room) -> _Replica:
    calls: list[Call] = []
    engine = FunctionEngine(contract.graph)
    scheduler = StepScheduler(contract, engine, room=room, observe=calls.append, clock=lambda: 0.0)
    return _Replica(scheduler=scheduler, calls=calls)


def _arrive(replica: _Replica, arrival: Arrival, contract: DenoiserContract, plan_of: PlanOf) -> None:
    if not replica.images:
        replica.now = max(replica.now, arrival.at)

    def heard(event: JobEvent) -> None:
        if isinstance(event, Finished):
            replica.done.append(arrival)

    urgency = Urgency(arrived=arrival.at, number=arrival.seed)
    prepared = _small(contract, plan_of(arrival))
    replica.scheduler.submit(Job(prepared=prepared, listener=heard, urgency=urgency))


def _call(replica: _Replica, machine: Machine) -> list[Served]:
    replica.scheduler.tick()
    call = replica.calls.pop()
    replica.now += machine.table.seconds(call.images, call.guided) + machine.overhead
    finished, replica.done = replica.done, []
    served = []
    for arrival in finished:
        if not machine.beside:
            replica.now += machine.picture_seconds
        late = machine.picture_seconds if machine.beside else 0.0
        served.append(Served(arrival=arrival, seconds=replica.now + late - arrival.at))
    return served


def _small(contract: DenoiserContract, plan: Plan) -> Prepared:
    """An image of the smallest size that the contract can name: nothing looks at its numbers."""
    inputs = {spec.name: spec.dims[1:] for spec in contract.conditioning}
    names = symbols([*contract.latents, *(dim for dims in inputs.values() for dim in dims)])
    sizes: Mapping[str, int] = dict.fromkeys(names, 1)
    given = {
        spec.name: torch.zeros(1, *evaluate(inputs[spec.name], sizes), dtype=TORCH_DTYPES[spec.dtype])
        for spec in contract.conditioning
    }
    return Prepared(
        requests=(GenerationRequest(prompt="-", height=1, width=1, steps=len(plan.steps)),),
        plan=plan,
        latents=torch.zeros(1, *evaluate(contract.latents, sizes)),
        conditioning=Conditioning(given=given, negative=given),
        anneal=None,
        noise=None,
        cut=(),
    )
