"""Engines: all do what a graph's contract says and refuse what does not fit; the table says who runs what."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from emag_export.bundle import Bundle
from emag_export.contract import GraphSpec, TensorSpec, Variant
from emag_export.engines.compiled import CompiledEngine
from emag_export.engines.config import EngineConfig
from emag_export.engines.eager import EagerEngine
from emag_export.engines.function import FunctionEngine
from emag_export.engines.observed import ObservedEngine
from emag_export.engines.ort import OnnxRuntimeEngine, OrtOptions
from emag_export.engines.protocol import Engine, check_feeds
from emag_export.engines.registry import BACKENDS, EngineOpener, open_backend
from emag_export.engines.tensorrt.flavour import FLAVOURS
from emag_export.errors import ContractError, EngineError, InputError
from emag_export.exporter.graph.examples import DENOISER_CHECK_SIZES, DENOISER_EXAMPLE_SIZES, random_inputs
from emag_export.families.family import load
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


@pytest.fixture
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle(tiny_bundle)


def test_the_table_of_backends() -> None:
    assert set(BACKENDS) == {"onnxruntime", *FLAVOURS, "torch", "torch-compile"}
    assert EngineConfig().backend in BACKENDS
    for name, row in BACKENDS.items():
        assert callable(load(row.opener)), name
        assert row.runs_on, name
        assert set(row.runs_on) <= {"cpu", "cuda"}, name
        assert set(row.takes) <= set(asdict(EngineConfig())), name
        assert row.needs_source == ("source" in row.takes), name
        assert row.summary, name


SPECIAL: dict[str, Any] = {
    "threads": 2,
    "provider": "CUDAExecutionProvider",
    "weight_budget": 0,
    "source": "elsewhere",
}
"""Options that not every backend takes, other than by default."""


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_is_opened_as_configured_on_its_first_device(
    bundle: Bundle, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A source is welcome everywhere: who does not need it need not know where the model is."""
    row, given = BACKENDS[backend], []

    def opened(config: EngineConfig, of: Bundle) -> EngineOpener:
        given.append(config)
        assert of is bundle
        return made

    def made(bundle: Bundle, component: str) -> Engine:
        return FunctionEngine(bundle.spec(component))

    monkeypatch.setattr(row.opener.replace(":", "."), opened)
    words = {name: SPECIAL[name] for name in {*row.takes, "source"}}
    assert open_backend(EngineConfig(backend=backend, cuda_graphs=False, **words), bundle) is made
    assert given == [EngineConfig(backend=backend, device=row.runs_on[0], cuda_graphs=False, **words)]
    for device in (*row.runs_on, *["cuda:1"] * ("cuda" in row.runs_on)):
        open_backend(EngineConfig(backend=backend, device=device), bundle)
        assert given[-1].device == device


def test_onnxruntime_is_what_opens_a_component_where_nothing_is_said(bundle: Bundle) -> None:
    with open_backend(EngineConfig(), bundle)(bundle, "vae_decoder") as engine:
        assert isinstance(engine, OnnxRuntimeEngine)
        assert (engine.device, engine.spec) == (torch.device("cpu"), bundle.spec("vae_decoder"))


def test_an_unknown_backend_is_refused_with_the_known_ones(bundle: Bundle) -> None:
    with pytest.raises(InputError) as caught:
        open_backend(EngineConfig(backend="openvino"), bundle)
    assert str(caught.value) == (
        "there is no `backend` 'openvino'; choose onnxruntime, tensorrt, tensorrt-rtx, torch, torch-compile"
    )


@pytest.mark.parametrize(
    ("backend", "device", "says"),
    [
        ("tensorrt", "cpu", "tensorrt runs on cuda, not on cpu; leave out `device`"),
        ("tensorrt-rtx", "cpu:0", "tensorrt-rtx runs on cuda, not on cpu:0; leave out `device`"),
        ("onnxruntime", "tpu", "onnxruntime runs on cpu and cuda, not on tpu; leave out `device`"),
        ("torch", "cuda0", "torch runs on cpu and cuda, not on cuda0; leave out `device`"),
    ],
)
def test_a_device_that_a_backend_does_not_run_on_is_refused(
    bundle: Bundle, backend: str, device: str, says: str
) -> None:
    with pytest.raises(InputError) as caught:
        open_backend(EngineConfig(backend=backend, device=device), bundle)
    assert str(caught.value) == says


@pytest.mark.parametrize(
    ("name", "takers"),
    [
        ("threads", "onnxruntime"),
        ("provider", "onnxruntime"),
        ("weight_budget", "tensorrt and tensorrt-rtx"),
    ],
)
def test_an_option_that_a_backend_does_not_take_is_refused(bundle: Bundle, name: str, takers: str) -> None:
    others = [backend for backend in BACKENDS if backend not in takers.split(" and ")]
    assert others
    for backend in others:
        with pytest.raises(InputError) as caught:
            open_backend(EngineConfig(backend=backend, **{name: SPECIAL[name]}), bundle)
        assert str(caught.value) == f"`{name}` is for {takers}; {backend} takes none, leave it out"


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"threads": -1}, "`threads` is -1; give 0 or more"),
        ({"weight_budget": -1}, "`weight_budget` is -1 MiB; give 0 or more"),
    ],
)
def test_numbers_below_nothing_are_refused(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError) as caught:
        EngineConfig(**wrong)
    assert str(caught.value) == says
