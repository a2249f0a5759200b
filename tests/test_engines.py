"""Engines: all do what a graph's contract says and refuse what does not fit."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from emag_export.contract import GraphSpec, TensorSpec
from emag_export.engines.compiled import CompiledEngine
from emag_export.engines.eager import EagerEngine
from emag_export.engines.function import FunctionEngine
from emag_export.engines.observed import ObservedEngine
from emag_export.engines.ort import OnnxRuntimeEngine, OrtOptions
from emag_export.engines.protocol import Engine, check_feeds
from emag_export.errors import ContractError, EngineError
from emag_export.exporter.graph.examples import DENOISER_CHECK_SIZES, DENOISER_EXAMPLE_SIZES, random_inputs
from emag_export.kinds import Variant
from tests.conftest import Exported, Exporter
from tests.typecheck import unchecked

SIZES = DENOISER_CHECK_SIZES[1]


@pytest.fixture(scope="module")
def graph(exported: Exporter) -> Exported:
    return exported("sd3", Variant.EMAG_Q)


def eager(graph: Exported) -> EagerEngine:
    """The module itself."""
    return EagerEngine(graph.fork, graph.contract.graph)


OTHERS: dict[str, Callable[[Exported], Engine]] = {
    "torch": eager,
    "onnxruntime": Exported.engine,
    "function": lambda graph: FunctionEngine(graph.contract.graph, eager(graph).run),
    "observed": lambda graph: ObservedEngine(eager(graph)),
}
"""All engines of the CPU but the one that has to be traced without checks."""


@pytest.fixture(scope="module", params=[*OTHERS, "torch-compile"])
def engine(request: pytest.FixtureRequest, graph: Exported) -> Iterator[Engine]:
    """torch.compile traces everything, but generates no code: that takes a minute (test_compiled.py)."""
    if request.param == "torch-compile":
        with unchecked() as plain:
            module = plain.fork(graph.fork.model, graph.contract)
            with CompiledEngine(module, graph.contract.graph, backend="aot_eager") as engine:
                yield engine
    else:
        with OTHERS[request.param](graph) as engine:
            yield engine


@pytest.fixture
def feeds(graph: Exported) -> dict[str, Tensor]:
    return random_inputs(graph.contract.graph, SIZES)


@pytest.mark.parametrize("sizes", [DENOISER_EXAMPLE_SIZES, *DENOISER_CHECK_SIZES])
def test_onnxruntime_agrees_with_torch(graph: Exported, sizes: dict[str, int]) -> None:
    feeds = random_inputs(graph.contract.graph, sizes, seed=5)
    wanted = eager(graph).run(feeds)
    with graph.engine() as engine:
        got = engine.run(feeds)
    for name, tensor in wanted.items():
        # Other order of float32 sums; measured below 1e-5 on values up to 10.
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=1e-4)


def test_outputs_have_the_shapes_of_the_contract(
    engine: Engine, feeds: dict[str, Tensor], graph: Exported
) -> None:
    outputs = engine.run(feeds)
    assert {name: tuple(tensor.shape) for name, tensor in outputs.items()} == (
        graph.contract.graph.output_shapes(SIZES)
    )


def test_a_given_buffer_is_written_in_place(engine: Engine, feeds: dict[str, Tensor]) -> None:
    wanted = engine.run(feeds)["ema_state_out"]
    buffer = torch.full_like(wanted, torch.nan)
    got = engine.run(feeds, out={"ema_state_out": buffer})
    assert got["ema_state_out"].data_ptr() == buffer.data_ptr()
    assert torch.equal(buffer, wanted)


def test_inputs_are_left_alone(engine: Engine, feeds: dict[str, Tensor]) -> None:
    before = {name: tensor.clone() for name, tensor in feeds.items()}
    engine.run(feeds)
    assert all(torch.equal(feeds[name], tensor) for name, tensor in before.items())


def test_inputs_need_not_be_contiguous(engine: Engine, feeds: dict[str, Tensor]) -> None:
    wanted = engine.run(feeds)["noise_pred"]
    strided = feeds["hidden_states"].transpose(2, 3).contiguous().transpose(2, 3)
    assert not strided.is_contiguous()
    got = engine.run({**feeds, "hidden_states": strided})["noise_pred"]
    # A convolution may take another path for another layout; the rounding of float32 sums.
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "fed", "message"),
    [
        ("ema_step", None, "transformer was not fed ema_step; it takes hidden_states"),
        ("extra", torch.zeros(1), "transformer has no input extra; it takes hidden_states"),
        ("timestep", torch.zeros(2).double(), "timestep has dtype float64, .* float32; convert it with .to("),
        ("branch_rows", torch.zeros(3).int(), "branch_rows has dtype int32, .* int64"),
        ("timestep", torch.zeros(5), "timestep has size 5 along axis 0, expected trunk_rows = 2"),
        ("timestep", torch.zeros(2, 1), r"timestep has shape \[2, 1\], expected 1 dimensions"),
        ("hidden_states", torch.zeros(2, 4, 7, 16), "hidden_states has size 7 along axis 2.* multiple of 2"),
        ("layer_mask", torch.zeros(1, 3), "layer_mask has size 3 along axis 1, expected 2 as exported"),
        (
            "timestep",
            torch.zeros(2, device="meta"),
            "timestep lies on meta, .* runs on cpu; move it with .to(",
        ),
    ],
)
def test_wrong_inputs_are_refused(
    engine: Engine, feeds: dict[str, Tensor], name: str, fed: Tensor | None, message: str
) -> None:
    wrong = {key: value for key, value in feeds.items() if key != name}
    if fed is not None:
        wrong[name] = fed
    with pytest.raises(ContractError, match=message.replace(".to(", r"\.to\(")):
        engine.run(wrong)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "ema_state_out",
            lambda tensor: tensor[..., :-1].contiguous(),
            "buffer for ema_state_out is .* contiguous",
        ),
        (
            "ema_state_out",
            lambda tensor: tensor.half(),
            r"float16, this call writes contiguous .* torch\.float32",
        ),
        (
            "ema_state_out",
            lambda tensor: tensor.transpose(-1, -2).contiguous().transpose(-1, -2),
            "contiguous",
        ),
        ("ema_state", lambda tensor: tensor, "transformer has no output ema_state; it gives noise_pred"),
    ],
)
def test_wrong_buffers_are_refused(
    engine: Engine, feeds: dict[str, Tensor], name: str, change: Any, message: str
) -> None:
    buffer = change(torch.zeros_like(feeds["ema_state"]))
    with pytest.raises(ContractError, match=message):
        engine.run(feeds, out={name: buffer})


def test_devices_are_told_apart_by_number() -> None:
    """A device without a number is whichever one is current, so it fits all of its kind."""
    spec = GraphSpec(name="part", inputs=(TensorSpec(name="x", dtype="float32", dims=("n",)),), outputs=())
    with FakeTensorMode():
        second = {"x": torch.zeros(3, device="cuda:1")}
    assert check_feeds(spec, second, torch.device("cuda")) == {"n": 3}
    assert check_feeds(spec, second, torch.device("cuda:1")) == {"n": 3}
    with pytest.raises(ContractError, match=r"x lies on cuda:1, this engine runs on cuda:0; move it with"):
        check_feeds(spec, second, torch.device("cuda:0"))


def test_a_broken_graph_is_an_engine_error(graph: Exported, tmp_path: Path) -> None:
    broken = tmp_path / "model.onnx"
    broken.write_bytes(b"no graph")
    with pytest.raises(EngineError, match=f"cannot load {re.escape(str(broken))}"):
        OnnxRuntimeEngine(broken, graph.contract.graph)


def test_every_engine_is_one(engine: Engine, graph: Exported) -> None:
    assert isinstance(engine, Engine)
    assert (engine.spec, engine.device) == (graph.contract.graph, torch.device("cpu"))
    assert engine.name


@pytest.fixture(params=[*OTHERS, "torch-compile"])
def fresh(request: pytest.FixtureRequest, graph: Exported) -> Engine:
    """An engine that nobody else has; nothing is compiled before the first call."""
    if request.param == "torch-compile":
        return CompiledEngine(graph.fork, graph.contract.graph, backend="aot_eager")
    return OTHERS[request.param](graph)


def test_closing_again_does_nothing(fresh: Engine) -> None:
    with fresh as entered:
        assert entered is fresh
        fresh.close()
        fresh.close()
    fresh.close()


def test_an_error_inside_passes_through_and_closes(fresh: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[Engine] = []
    close = type(fresh).close

    def noted(engine: Any) -> None:
        closed.append(engine)
        close(engine)

    monkeypatch.setattr(type(fresh), "close", noted)
    with pytest.raises(ZeroDivisionError), fresh:
        raise ZeroDivisionError
    assert fresh in closed


def test_a_profile_is_written_once_when_the_session_closes(graph: Exported, tmp_path: Path) -> None:
    engine = OnnxRuntimeEngine(
        graph.path, graph.contract.graph, OrtOptions(threads=1, profile=tmp_path / "profile")
    )
    with engine:
        engine.run(random_inputs(graph.contract.graph, SIZES))
        engine.close()
        (written,) = tmp_path.iterdir()
        before = written.read_bytes()
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [before]
