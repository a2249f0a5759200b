"""Budgets of engines that stream their weights."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from emag_export.engines.tensorrt.streaming import automatic_budget, set_budget
from emag_export.errors import EngineError
from tests.tensorrt_bench import Bench, call, state

GB = 10**9


@pytest.mark.parametrize(
    ("free", "budget"),
    [(20 * GB, 11 * GB), (40 * GB, 16 * GB), (5 * GB, 0)],
    ids=["what is left", "all of them", "none"],
)
def test_the_automatic_budget_is_what_is_left_beside_scratch_and_tensors(free: int, budget: int) -> None:
    """16 GB of weights, 6 GB of scratch, 1 GB of tensors, a tenth in reserve: beyond 2^31 throughout."""
    engine = SimpleNamespace(
        streamable_weights_size=16 * GB, device_memory_size_v2=6 * GB, weight_streaming_budget_v2=0
    )
    assert automatic_budget(engine, free, GB) == budget
    set_budget(engine, budget)
    assert engine.weight_streaming_budget_v2 == budget


class Wrapping:
    """Keeps budgets in 32 bits."""

    streamable_weights_size = 16 * GB

    def __init__(self) -> None:
        self._budget = 0

    @property
    def weight_streaming_budget_v2(self) -> int:
        return self._budget

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, wanted: int) -> None:
        self._budget = wanted % 2**32


def test_a_budget_that_did_not_arrive_is_an_error() -> None:
    set_budget(Wrapping(), 4 * GB)
    with pytest.raises(EngineError, match=r"^11000000000 bytes .* keeps 2410065408; .*`weight_budget`"):
        set_budget(Wrapping(), 11 * GB)


@pytest.mark.parametrize(("wanted", "kept"), [(None, 11 * GB), (3 * GB, 3 * GB)])
def test_an_engine_that_streams_weights_gets_its_budget(
    wanted: int | None, kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Free memory is read with a budget of nothing; averages and tensors of the double take 12 kB."""
    bench = Bench(tmp_path, monkeypatch)
    bench.streaming = True
    engine: object = bench.plan_engine
    vars(engine).update(streamable_weights_size=16 * GB, device_memory_size_v2=6 * GB)
    vars(engine).update(weight_streaming_budget_v2=16 * GB)

    def free(device: torch.device) -> tuple[int, int]:
        assert vars(engine)["weight_streaming_budget_v2"] == 0
        return 17 * GB // 9 * 10, 80 * GB

    monkeypatch.setattr("torch.cuda.mem_get_info", free)
    with bench.open(weight_budget=wanted) as opened:  # type: ignore[arg-type]
        assert vars(engine)["weight_streaming_budget_v2"] == pytest.approx(kept, abs=13_000)
        average, spare = state(), state()
        for seed in range(3):
            call(opened, average, spare, seed=seed)
        assert len(bench.plan_engine.contexts) == 2, "streaming cannot be captured"
