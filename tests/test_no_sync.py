"""The loop never makes the host wait for the device: counted on pretended CUDA tensors, and on a real GPU."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from emag_export.engines.eager import EagerEngine
from emag_export.engines.function import FunctionEngine
from emag_export.kinds import Variant
from emag_export.runtime.guidance.rules import Guidance
from emag_export.runtime.loop import Anneal, denoise
from emag_export.runtime.prepare import cads_annealer
from emag_export.runtime.sampling.call import ImageStep, place_calls
from emag_export.runtime.sampling.conditioning import Conditioning
from emag_export.runtime.sampling.plan import EmagWindows, Phase, Plan, make_plan
from emag_export.runtime.sampling.rows import place_rows
from emag_export.runtime.sampling.schedule import flow_match_schedule
from emag_export.runtime.sampling.select import Choose, always, by_delta, scheduled
from emag_export.runtime.sampling.state import RunState
from emag_export.runtime.step import step
from tests import sd3
from tests.conftest import BLOCKS, small_fork

GPU = torch.device("cuda:0")
GRID, TEXT, IMAGES = (3, 4), 5, 2

READS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.is_nonzero.default,
}
"""Operators whose result the host needs, so that it waits."""


class SyncCounter(TorchDispatchMode):
    """Lists every operator for which CUDA would make the host wait.

    Copies between host and device do, except non-blocking ones from pinned memory, which pretended tensors
    do not have: the counter remembers what was asked to be pinned. PyTorch's bindings look for the device
    itself before they index or copy; they are told ``meta``, which is always there.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []
        self._pinned: list[Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._pin_memory.default:
            self._pinned.append(args[0].clone())
            return self._pinned[-1]
        if func is torch.ops.prim.device.default:
            device = func(*args, **kwargs)
            return torch.device("meta") if device.type == "cuda" else device
        devices = {leaf.device.type for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        if "cuda" in devices and (func in READS or self._is_hidden_copy(func, args)):
            self.found.append(str(func))
        if func is torch.ops.aten._to_copy.default:
            devices.add(torch.device(kwargs.get("device") or args[0].device).type)
        copies = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        if copies and devices == {"cpu", "cuda"} and not self._is_asynchronous(func, args, kwargs):
            self.found.append(str(func))
        return func(*args, **kwargs)

    @staticmethod
    def _is_hidden_copy(func: Any, args: tuple[Any, ...]) -> bool:
        """Indexing with a list, an index on the host, or a mask whose ones have to be counted."""
        if func not in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default):
            return False
        return any(x is not None and (x.device.type != "cuda" or x.dtype is torch.bool) for x in args[1])

    def _is_asynchronous(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        source = args[0] if func is torch.ops.aten._to_copy.default else args[1]
        pinned = any(source is tensor for tensor in self._pinned)
        return pinned and bool(kwargs.get("non_blocking"))


@pytest.fixture
def counter() -> Iterator[SyncCounter]:
    """Everything inside a test with this is pretended; layouts placed by others are no use there."""
    place_rows.cache_clear()
    with FakeTensorMode(), SyncCounter() as mode:
        yield mode
    place_rows.cache_clear()


# Real tensors, made before a test begins to pretend.
CONTRACT = small_fork("sd3", Variant.EMAG_Q).contract
SCHEDULE = flow_match_schedule({"shift": 3.0}, 8, GRID[0] * GRID[1])
CHOICES: dict[str, Choose] = {
    "by Delta": by_delta,
    "always": always(BLOCKS, BLOCKS),
    "scheduled": scheduled(torch.eye(8, len(BLOCKS)).tolist()),
}
NAMES = ("cfg", "emag", "emag-only", "apg", "emag+apg", "emag+cads")


MODIFIERS: dict[str, Any] = {
    "interval": (0.2, 0.7),
    "rescale": 0.5,
    "zero_star": True,
    "tangential": True,
    "guided_channels": 3,
}


def plan_of(name: str, chosen: str = "by Delta", **modifiers: Any) -> Plan:
    return make_plan(CONTRACT, SCHEDULE, Guidance(name=name, **modifiers), EmagWindows(), CHOICES[chosen])


def annealer(plan: Plan) -> Anneal | None:
    if not plan.guidance.rule.cads:
        return None
    return cads_annealer(plan, [torch.Generator().manual_seed(image) for image in range(IMAGES)])


def inputs() -> tuple[Tensor, Conditioning]:
    """Noise and conditioning on the GPU."""

    def normal(*shape: int) -> Tensor:
        return torch.ones(IMAGES, *shape, device=GPU)

    conditioning = sd3.conditioning(normal(TEXT, 16), normal(8), normal(TEXT, 16), normal(8))
    return normal(4, 2 * GRID[0], 2 * GRID[1]), conditioning


@pytest.mark.parametrize("modifiers", [{}, MODIFIERS], ids=["plain", "modified"])
@pytest.mark.parametrize("chosen", CHOICES)
@pytest.mark.parametrize("name", NAMES)
def test_no_step_waits(name: str, chosen: str, modifiers: dict[str, Any], counter: SyncCounter) -> None:
    plan, (latents, given) = plan_of(name, chosen, **modifiers), inputs()
    engine = FunctionEngine(CONTRACT.graph, device=GPU)
    start = RunState.start(CONTRACT, latents, given.given)
    run = denoise(engine, plan, start, given, anneal=annealer(plan))
    next(run)
    assert counter.found, "the layouts were copied before the first step; the counter saw nothing of it"
    counter.found.clear()
    rest = list(run)
    assert len(rest) == 7
    assert any(step.plan.phase == Phase.GUIDE for step in rest) == plan.guidance.rule.perturbed
    assert not counter.found


def test_images_of_different_runs_do_not_wait(counter: SyncCounter) -> None:
    """Once a mixture of phases is known: what a server does between two steps of different pictures."""
    latents, given = inputs()
    plans = plan_of("emag", **MODIFIERS), plan_of("emag+apg")
    engine = FunctionEngine(CONTRACT.graph, device=GPU)
    for first, second in ((3, 0), (4, 0)):
        counter.found.clear()
        steps = plans[0].steps[first], plans[1].steps[second]
        assert {step.phase for step in steps} == {Phase.TRACK, Phase.GUIDE}
        images = [
            ImageStep(step=planned, guidance=plan.guidance)
            for planned, plan in zip(steps, plans, strict=True)
        ]
        (call,) = place_calls([images], CONTRACT, GPU)
        state = RunState.start(CONTRACT, latents, given.given)
        step(engine, call, state, given.trunk(call.rows))
    assert not counter.found


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: torch.tensor([1.0], device=GPU),
        lambda x: x.cpu(),
        lambda x: torch.zeros(3).to(GPU),
        lambda x: torch.zeros(3).to(GPU, non_blocking=True),
        lambda x: torch.zeros(3).pin_memory().to(GPU),
        lambda x: x.copy_(torch.zeros(3)),
        lambda x: x.nonzero(),
        lambda x: torch.equal(x, x),
        lambda x: bool(x[0] > 0),
        lambda x: x[[0, 2]],
        lambda x: x[torch.tensor([0, 2])],
        lambda x: x[x > 0],
    ],
)
def test_the_counter_counts(counter: SyncCounter, wait: Callable[[Tensor], Any]) -> None:
    x = torch.zeros(3, device=GPU)
    assert not counter.found
    with suppress(Exception):  # a pretended tensor has no number to give
        wait(x)
    assert counter.found


def test_the_counter_lets_pass_what_does_not_wait(counter: SyncCounter) -> None:
    x = torch.zeros(3, device=GPU)
    torch.zeros(3).pin_memory().to(GPU, non_blocking=True)
    x[1:].fill_(2.0).mul_(3.0)
    x[x.argsort()]
    (x.half() + x.argmax()).float()
    assert not counter.found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU that PyTorch sees")
@pytest.mark.parametrize("modifiers", [{}, MODIFIERS], ids=["plain", "modified"])
@pytest.mark.parametrize("chosen", CHOICES)
@pytest.mark.parametrize("name", NAMES)
def test_a_real_gpu_is_not_waited_for(name: str, chosen: str, modifiers: dict[str, Any]) -> None:
    engine = EagerEngine(small_fork("sd3", Variant.EMAG_Q).to(GPU), CONTRACT.graph, str(GPU))
    plan, (latents, given) = plan_of(name, chosen, **modifiers), inputs()
    start = RunState.start(CONTRACT, latents, given.given)
    run = denoise(engine, plan, start, given, anneal=annealer(plan))
    next(run)
    try:
        torch.cuda.set_sync_debug_mode("error")
        *_, last = run
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert last.latents.isfinite().all()
