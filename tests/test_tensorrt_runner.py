"""The TensorRT runner around engines that compute on the host: addresses, contexts, captures, kernels."""

import gc
from pathlib import Path

import pytest
import tensorrt_rtx
import torch

from emag_export.engines.tensorrt import runner
from emag_export.engines.tensorrt.flavour import Flavour
from emag_export.engines.tensorrt.workspace import empty_aligned
from emag_export.errors import EngineError
from tests import tensorrt_double as double
from tests.tensorrt_bench import REBUILD, RTX, TENSORRT, Bench, call, state
from tests.tensorrt_double import HostGraph


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("pretended", "real"),
    [
        (double.Cache, tensorrt_rtx.IRuntimeCache),
        (double.Config, tensorrt_rtx.IRuntimeConfig),
        (double.Context, tensorrt_rtx.IExecutionContext),
        (double.Engine, tensorrt_rtx.ICudaEngine),
    ],
)
def test_the_doubles_have_methods_of_the_real_classes_only(pretended: type, real: type) -> None:
    names = [name for name, value in vars(pretended).items() if callable(value) and name[0] != "_"]
    assert names
    assert [name for name in names if not callable(getattr(real, name, None))] == []


def test_what_else_is_used_exists_in_the_real_module() -> None:
    assert {"WHOLE_GRAPH_CAPTURE", "DISABLED"} <= tensorrt_rtx.CudaGraphStrategy.__members__.keys()
    kernels = tensorrt_rtx.DynamicShapesKernelSpecializationStrategy
    assert {"EAGER", "LAZY"} <= kernels.__members__.keys()
    assert "USER_MANAGED" in tensorrt_rtx.ExecutionContextAllocationStrategy.__members__
    for owner, names in (
        (
            tensorrt_rtx.IRuntimeConfig,
            ("cuda_graph_strategy", "dynamic_shapes_kernel_specialization_strategy"),
        ),
        (
            tensorrt_rtx.ICudaEngine,
            (
                "streamable_weights_size",
                "weight_streaming_budget_v2",
                "device_memory_size_v2",
                "create_engine_inspector",
            ),
        ),
    ):
        assert [name for name in names if not hasattr(owner, name)] == []


@pytest.mark.parametrize("flavour", [TENSORRT, RTX], ids=["tensorrt", "tensorrt-rtx"])
@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_buffers_that_take_turns_give_what_is_wanted(
    bench: Bench, flavour: Flavour, cuda_graphs: bool
) -> None:
    """Two phases and two parities, over and over: every result is held against its definition."""
    with bench.open(flavour, cuda_graphs=cuda_graphs) as engine:
        average, spare = state(), state()
        for step in range(12):
            call(engine, average, spare, rows=2 if step < 6 else 3, seed=step)
            average, spare = spare, average
    profiles = len(engine._plan.record.profiles)
    assert len(bench.plan_engine.contexts) == profiles + (4 if cuda_graphs else 0)


def test_a_call_is_captured_right_after_a_run_in_a_context_of_its_own(bench: Bench) -> None:
    """Other sizes run in between: the double refuses a capture whose shapes were not the last to run."""
    with bench.open() as engine:
        average, spare = state(), state()
        bench.log.clear()
        call(engine, average, spare, seed=1)
        call(engine, average, spare, rows=3, seed=2)  # in the other profile's context
        call(engine, average, spare, seed=3)  # comes again: runs once more, and is captured
        call(engine, average, spare, rows=1, seed=4)
        call(engine, average, spare, seed=5)
        call(engine, average, spare, seed=6)
        ran = [line for line in bench.log if line.startswith("run")]
        assert ran == ["run (2, 64)", "run (3, 64)", "run (2, 64)", "run (1, 64)"], "then it is replayed"


def test_a_graph_is_captured_anew_where_scratch_memory_moved(bench: Bench) -> None:
    with bench.open() as engine:
        average, spare = state(), state()
        for seed in range(3):
            call(engine, average, spare, seed=seed)
        bench.workspace.reserve(1 << 20)  # another engine of the pipeline needs more
        bench.log.clear()
        for seed in range(2):
            call(engine, average, spare, seed=seed)
        assert [line for line in bench.log if line.startswith("run")] == ["run (2, 64)"]


def test_contexts_of_calls_that_repeat_are_bounded(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_REPEATS", 2)
    with bench.open() as engine:
        buffers = [state() for _ in range(4)]
        for seed, spare in enumerate(buffers[1:]):
            bench.log.clear()
            for _ in range(3):
                call(engine, buffers[0], spare, seed=seed)
            assert bench.log.count("host waits") == (1 if seed == 2 else 0), "it waits before a context ends"
        assert len(engine._repeats._kept) == 2


def test_a_call_that_never_comes_again_gets_no_context(bench: Bench) -> None:
    with bench.open() as engine:
        for seed in range(5):
            call(engine, state(), None, seed=seed)
        assert len(bench.plan_engine.contexts) == 2


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_what_does_not_lie_at_a_multiple_of_256_is_copied(bench: Bench, cuda_graphs: bool) -> None:
    """Rows of a larger tensor, as steps of a plan are: the double refuses their addresses."""
    with bench.open(cuda_graphs=cuda_graphs) as engine:
        rows = empty_aligned((8, 65), torch.float32, torch.device("cpu")).normal_()
        average, spare = rows[1:2, 1:], rows[3:4, :64]
        x = rows[5:7].reshape(-1)[1:129].view(2, 64)
        assert not any(tensor.data_ptr() % 256 == 0 for tensor in (average, spare, x))
        before = rows.clone()
        for _ in range(3):
            got = engine.run({"x": x, "ema_state": average}, out={"ema_state_out": spare})
            assert torch.equal(got["y"], 2 * x)
            assert got["ema_state_out"] is spare
            assert torch.equal(spare, average + x[:1])
        rows[3, :64] = before[3, :64]
        assert torch.equal(rows, before), "nothing else was written to"


def test_buffers_serve_callers_in_and_out_of_inference_mode(bench: Bench) -> None:
    with bench.open() as engine:
        average, spare = state(), state()
        for seed in range(6):
            with torch.inference_mode(seed % 2 == 1):  # the fixed buffers are made in the second call
                call(engine, average, spare, seed=seed)
        (kept,) = engine._repeats._kept.values()
        assert not any(buffer.is_inference() for buffer in kept.buffers.values())


@pytest.mark.parametrize("refusal", [None, RuntimeError("CUDA initialization failure")])
def test_a_refused_profile_is_an_engine_error(bench: Bench, refusal: Exception | None) -> None:
    bench.plan_engine.accepts_profiles, bench.plan_engine.profile_refusal = False, refusal
    with pytest.raises(EngineError, match=r"cannot prepare profile 0 of .*; lower `max_images`") as caught:
        bench.open()
    assert caught.value.remedy == REBUILD


def test_a_refused_shape_is_named(bench: Bench) -> None:
    with bench.open() as engine:
        bench.plan_engine.accepts_shapes = False
        with pytest.raises(
            EngineError, match=r"refused x of shape \(2, 64\) in .*transformer\.plan"
        ) as caught:
            call(engine, state(), None)
        assert caught.value.remedy == REBUILD
        bench.plan_engine.accepts_shapes = True
        call(engine, state(), None)


def test_a_refused_address_is_named(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    with bench.open() as engine:
        monkeypatch.setattr(double.Context, "set_tensor_address", lambda self, name, memory: name != "y")
        bench.log.clear()
        with pytest.raises(EngineError, match=r"refused the address of y in .*transformer\.plan"):
            call(engine, state(), None)
    assert bench.log[:2] == ["begin", "end"], "PyTorch's stream waits for what was launched before"


@pytest.mark.parametrize("ending_fails", [True, False])
def test_a_failed_capture_says_why_and_not_how_it_ended(
    bench: Bench, ending_fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.plan_engine.capture_fails = True
    monkeypatch.setattr(HostGraph, "ending_fails", ending_fails)
    with bench.open() as engine:
        average, spare = state(), state()
        call(engine, average, spare)
        with pytest.raises(
            EngineError, match=r"failed in .*transformer\.plan.*turn off `cuda_graphs`"
        ) as caught:
            call(engine, average, spare)
    assert HostGraph.capturing is None
    notes = getattr(caught.value, "__notes__", [])
    assert [note.split(": ")[0] for note in notes] == ["ending the capture failed as well"] * ending_fails


def test_a_capture_that_ends_with_an_error_is_an_engine_error(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    with bench.open() as engine:
        average, spare = state(), state()
        call(engine, average, spare)
        monkeypatch.setattr(HostGraph, "ending_fails", True)
        with pytest.raises(
            EngineError, match=r"cannot capture a call of .*previous error.*turn off `cuda_graphs`"
        ):
            call(engine, average, spare)


def test_kernels_compiled_in_a_run_are_kept_for_the_next(bench: Bench) -> None:
    """The double's configuration keeps its cache alive as little as TensorRT-RTX's does."""
    file = bench.folder.runtime_cache("transformer")
    for rows, kept in ((2, b"kernels 2"), (3, b"kernels 2,3")):
        with bench.open(RTX) as engine:
            gc.collect()
            call(engine, state(), None, rows=rows)
        assert file.read_bytes() == kept
    file.write_bytes(b"of another GPU")
    with bench.open(RTX) as engine:
        call(engine, state(), None, rows=1)
    assert file.read_bytes() == b"kernels 1"


@pytest.mark.parametrize("flavour", [TENSORRT, RTX], ids=["tensorrt", "tensorrt-rtx"])
def test_closing_again_waits_for_nothing_and_writes_nothing(bench: Bench, flavour: Flavour) -> None:
    kernels = bench.folder.runtime_cache("transformer")
    with bench.open(flavour) as engine:
        call(engine, state(), None)
        bench.log.clear()
        engine.close()
        assert bench.log == ["host waits"]
        assert kernels.is_file() is flavour.captures_graphs_itself
        kernels.unlink(missing_ok=True)
        engine.close()
    engine.close()
    assert bench.log == ["host waits"]
    assert not kernels.exists()


@pytest.mark.parametrize("eager_kernels", [True, False])
def test_tensorrt_rtx_is_configured_by_strategy(bench: Bench, eager_kernels: bool) -> None:
    """Contexts of one repeated call keep a CUDA graph; those whose addresses change capture none."""
    with bench.open(RTX, eager_kernels=eager_kernels) as engine:
        average, spare = state(), state()
        for seed in range(2):
            call(engine, average, spare, seed=seed)
        graphs = tensorrt_rtx.CudaGraphStrategy
        used = [context._config.cuda_graph_strategy for context in bench.plan_engine.contexts]
        assert used == [graphs.DISABLED, graphs.WHOLE_GRAPH_CAPTURE]
        kernels = tensorrt_rtx.DynamicShapesKernelSpecializationStrategy
        assert {
            config.dynamic_shapes_kernel_specialization_strategy for config in bench.plan_engine.configs
        } == {kernels.EAGER if eager_kernels else kernels.LAZY}
