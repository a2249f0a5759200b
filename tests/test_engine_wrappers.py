"""Engines around a function or around another engine, and what they tell of each call."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from emag_export.contract import GraphSpec, TensorSpec
from emag_export.engines.function import FunctionEngine
from emag_export.engines.observed import ObservedEngine
from emag_export.errors import ContractError

SUM = GraphSpec(
    name="part",
    inputs=(TensorSpec(name="x", dtype="float32", dims=("n",)),),
    outputs=(
        TensorSpec(name="double", dtype="float32", dims=("n",)),
        TensorSpec(name="sum", dtype="float32", dims=()),
    ),
)
X = {"x": torch.arange(3.0)}


def test_a_function_is_an_engine() -> None:
    """What it does not compute is left as it is, in the caller's buffer."""
    given: list[Mapping[str, Tensor]] = []

    def double(feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        given.append(feeds)
        return {"double": 2 * feeds["x"]}

    kept = torch.tensor(94.0)
    with FunctionEngine(SUM, double, name="doubles") as engine:
        outputs = engine.run(X, out={"sum": kept})
    assert engine.name == "doubles"
    assert [dict(feeds) for feeds in given] == [X]
    assert list(outputs) == ["double", "sum"]
    assert outputs["double"].tolist() == [0.0, 2.0, 4.0]
    assert outputs["sum"] is kept
    assert kept == 94.0


def test_an_engine_without_a_function_gives_outputs_of_the_right_shapes_and_computes_nothing() -> None:
    kept = torch.tensor([3.0, 4.0, 5.0])
    outputs = FunctionEngine(SUM).run(X, out={"double": kept})
    assert {name: tuple(tensor.shape) for name, tensor in outputs.items()} == {"double": (3,), "sum": ()}
    assert outputs["double"] is kept
    assert kept.tolist() == [3.0, 4.0, 5.0]


def test_a_function_runs_where_it_is_said_to() -> None:
    engine = FunctionEngine(SUM, device="meta")
    assert engine.device == torch.device("meta")
    assert {tensor.device.type for tensor in engine.run({"x": X["x"].to("meta")}).values()} == {"meta"}
    with pytest.raises(ContractError, match="x lies on cpu, this engine runs on meta"):
        engine.run(X)


class Watched(FunctionEngine):
    """Writes down what is asked of it."""

    def __init__(self, log: list[str]) -> None:
        super().__init__(SUM, lambda feeds: {"double": 2 * feeds["x"]}, name="inner")
        self.log = log

    def run(self, feeds: Mapping[str, Tensor], out: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """As ever."""
        self.log.append("run")
        return super().run(feeds, out)

    def close(self) -> None:
        """As ever."""
        self.log.append("close")


def test_an_observed_engine_tells_of_every_call_before_and_after() -> None:
    log: list[str] = []
    seen: list[Mapping[str, Tensor]] = []
    inner, buffer = Watched(log), torch.empty(3)

    def before(feeds: Mapping[str, Tensor]) -> None:
        log.append("before")
        assert feeds is X

    def after(feeds: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        log.append("after")
        assert feeds is X
        seen.append(outputs)

    with ObservedEngine(inner, before=before, after=after) as engine:
        assert (engine.name, engine.spec, engine.device) == (inner.name, inner.spec, inner.device)
        first, second = engine.run(X, out={"double": buffer}), engine.run(X)
    assert log == [*["before", "run", "after"] * 2, "close"]
    assert seen[0] is first
    assert seen[1] is second
    assert first["double"] is buffer
    assert buffer.tolist() == second["double"].tolist() == [0.0, 2.0, 4.0]


def test_a_call_that_fails_was_begun_and_gave_nothing() -> None:
    log: list[str] = []
    engine = ObservedEngine(
        Watched(log),
        before=lambda feeds: log.append("before"),
        after=lambda feeds, outputs: log.append("after"),
    )
    with pytest.raises(ContractError, match="was not fed x"):
        engine.run({})
    assert log == ["before", "run"]


def test_nobody_need_watch() -> None:
    assert ObservedEngine(Watched([])).run(X)["double"].tolist() == [0.0, 2.0, 4.0]
