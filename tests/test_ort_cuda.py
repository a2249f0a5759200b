"""onnxruntime on a GPU: what can be held without one, and, marked so, what cannot."""

import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from emag_export.engines.cuda_device import check_gpu, why_no_gpu
from emag_export.engines.eager import EagerEngine
from emag_export.engines.ort import OnnxRuntimeEngine, OrtOptions, available_providers
from emag_export.engines.ort_cuda import CudaRuns
from emag_export.engines.ort_providers import (
    CUDA,
    RTX,
    TENSORRT,
    check_provider,
    is_out_of_memory,
    provider_options,
    rtx_devices,
)
from emag_export.engines.repeats import CallKey, call_key
from emag_export.errors import EngineError, InputError, MissingDependencyError
from emag_export.exporter.graph.examples import DENOISER_CHECK_SIZES, random_inputs
from emag_export.kinds import Variant
from tests.conftest import Exported, Exporter

SIZES = DENOISER_CHECK_SIZES[1]
GPU = torch.device("cuda", 0)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU that PyTorch sees")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch sees a GPU")


@pytest.fixture(scope="module")
def graph(exported: Exporter) -> Exported:
    return exported("sd3", Variant.EMAG_Q)


@without_gpu
def test_a_missing_gpu_is_named_with_the_remedy(graph: Exported) -> None:
    with pytest.raises(
        EngineError,
        match=r"^cuda was asked for, but PyTorch .* sees no GPU: .* Without one, run with `device` cpu$",
    ):
        OnnxRuntimeEngine(graph.path, graph.contract.graph, OrtOptions(device="cuda"))


@pytest.mark.parametrize("device", ["tpu", "meta", "cuda0"])
def test_an_unknown_device_is_refused(graph: Exported, device: str) -> None:
    with pytest.raises(InputError, match=f"{device}.*take cpu, cuda or cuda:0"):
        OnnxRuntimeEngine(graph.path, graph.contract.graph, OrtOptions(device=device))


def test_a_build_of_pytorch_without_cuda_is_told_from_a_driver_that_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "a build without CUDA; install one with it" in str(why_no_gpu())
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert why_no_gpu() == "check the driver with: nvidia-smi"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: warnings.warn("driver is too old", stacklevel=1))
    assert why_no_gpu() == "driver is too old"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert why_no_gpu() is None


def test_a_gpu_beyond_the_last_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert check_gpu(torch.device("cuda")) == torch.device("cuda", 1)
    with pytest.raises(EngineError, match="cuda:2 was asked for, this machine has cuda:0 to cuda:1"):
        check_gpu(torch.device("cuda", 2))


def test_missing_providers_are_named_with_the_remedy() -> None:
    stock = ["AzureExecutionProvider", "CPUExecutionProvider"]
    wanted = (
        r"onnxruntime 1\.31 here has no CUDA.*; it has Azure.*pip uninstall onnxruntime, then pip install "
        r"\"onnxruntime-gpu>=1\.30\" .both own the same module"
    )
    with pytest.raises(EngineError, match=wanted):
        check_provider(CUDA, stock, "1.31")
    with pytest.raises(
        EngineError, match=r"has no Tensorrt.*onnxruntime-gpu \"tensorrt>=10,<11\".*TensorRT 10"
    ):
        check_provider(TENSORRT, stock, "1.31")
    with pytest.raises(InputError, match=f"no provider 'DmlExecutionProvider' for cuda; choose {CUDA}"):
        check_provider("DmlExecutionProvider", stock, "1.31")
    check_provider(CUDA, [CUDA, *stock], "1.31")
    check_provider(RTX, stock, "1.31")  # a plug-in of stock onnxruntime: its own package is looked for


@pytest.mark.parametrize(("version", "fits"), [("1.29.1", False), ("1.30.0", True), ("2.0", True)])
def test_an_onnxruntime_whose_captured_graphs_go_wrong_is_refused(version: str, fits: bool) -> None:
    available = [CUDA, TENSORRT, "CPUExecutionProvider"]
    check_provider(TENSORRT, available, version)  # nothing is captured there
    if fits:
        check_provider(CUDA, available, version)
        return
    wanted = (
        r"onnxruntime 1\.29\.1 is too old for CUDA.*, 1\.30 or newer .*pip install \"onnxruntime-gpu>=1\.30"
    )
    with pytest.raises(EngineError, match=wanted):
        check_provider(CUDA, available, version)


def test_a_missing_plug_in_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime_ep_nv_tensorrt_rtx", None)
    with pytest.raises(MissingDependencyError, match="pip install onnxruntime-ep-nv-tensorrt-rtx"):
        rtx_devices(None, GPU)


@pytest.mark.parametrize(
    ("provider", "further"),
    [
        (
            CUDA,
            {
                "arena_extend_strategy": "kSameAsRequested",
                "cudnn_conv_algo_search": "HEURISTIC",
                "use_tf32": "0",
                "enable_cuda_graph": "1",
            },
        ),
        (TENSORRT, {}),
        (RTX, {"has_user_compute_stream": "1"}),
    ],
)
def test_options_are_spelled_as_onnxruntime_does(provider: str, further: dict[str, str]) -> None:
    options = provider_options(provider, torch.device("cuda", 1), 94, cuda_graphs=True)
    assert options == {"device_id": "1", "user_compute_stream": "94", **further}


def test_graphs_and_tf32_are_switched_by_their_options() -> None:
    options = provider_options(CUDA, GPU, 1, cuda_graphs=False, tf32=True)
    assert (options["enable_cuda_graph"], options["use_tf32"]) == ("0", "1")


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("BFCArena::AllocateRawInternal Failed to allocate memory for requested buffer of size 4096", True),
        ("CUDA failure 2: out of memory ; GPU=0", True),
        ("CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED", True),
        ("CUDA failure 209: no kernel image is available", False),
    ],
)
def test_out_of_memory_is_recognised(message: str, expected: bool) -> None:
    assert is_out_of_memory(RuntimeError(message)) is expected
    assert is_out_of_memory(torch.OutOfMemoryError(""))


def test_a_call_that_does_not_fit_names_the_remedy(graph: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 5 GiB")

    monkeypatch.setattr("emag_export.engines.ort.allocate_outputs", full)
    wanted = r"ran out of device memory in transformer; generate fewer .*`batch_size`.*5 GiB"
    with graph.engine() as engine, pytest.raises(EngineError, match=wanted):
        engine.run(random_inputs(graph.contract.graph, SIZES))


def test_a_key_is_sizes_and_the_addresses_of_the_averages(graph: Exported) -> None:
    spec = graph.contract.graph
    feeds = random_inputs(spec, SIZES)
    spare = torch.empty_like(feeds["ema_state"])

    def key(feeds: Mapping[str, Tensor], out: Mapping[str, Tensor] | None) -> CallKey | None:
        return call_key(spec, SIZES, feeds, out)

    first = key(feeds, {"ema_state_out": spare})
    assert first is not None
    assert first == key({**feeds, "timestep": feeds["timestep"].clone()}, {"ema_state_out": spare})
    assert first != key({**feeds, "ema_state": spare}, {"ema_state_out": feeds["ema_state"]})
    assert first != call_key(spec, {**SIZES, "text": 6}, feeds, {"ema_state_out": spare})


def test_what_has_no_fixed_address_is_not_captured(graph: Exported) -> None:
    spec = graph.contract.graph
    feeds = random_inputs(spec, SIZES)
    spare = torch.empty_like(feeds["ema_state"])
    assert call_key(spec, SIZES, feeds, None) is None
    assert call_key(spec, SIZES, feeds, {"layer_delta": spare}) is None
    strided = {**feeds, "ema_state": feeds["ema_state"].transpose(-1, -2).contiguous().transpose(-1, -2)}
    assert call_key(spec, SIZES, strided, {"ema_state_out": spare}) is None
    assert call_key(type(spec)(name="decoder", inputs=(), outputs=()), {}, {}, {}) is None


class PretendedStream:
    """Stands for a CUDA stream around a session on the CPU, and writes down who waited for whom."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log, self.device = name, log, torch.device("cpu")

    def wait_stream(self, other: "PretendedStream") -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def synchronize(self) -> None:
        self.log.append("host waits")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    current = PretendedStream("torch", lines)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    return lines


class LoggingRunOptions:
    """Writes down the run options onnxruntime is given."""

    def __init__(self, ort: Any, log: list[str]) -> None:
        self._ort, self._log = ort, log

    def RunOptions(self) -> Any:  # noqa: N802  onnxruntime's name
        log, options = self._log, self._ort.RunOptions()

        class Options(type(options)):  # type: ignore[misc]
            def add_run_config_entry(self, key: str, value: str) -> None:
                log.append(f"{key}={value}")
                super().add_run_config_entry(key, value)

        return Options()


def test_a_replayed_call_gives_what_a_plain_one_gives(graph: Exported, log: list[str]) -> None:
    """The staging around a CUDA graph, on the CPU: fixed buffers in, fixed buffers out, averages in place.

    The oracle is the same session without any of it, on other inputs in every call.
    """
    import onnxruntime

    spec = graph.contract.graph
    with graph.engine() as engine:
        runs = CudaRuns(
            LoggingRunOptions(onnxruntime, log),
            engine._session,
            PretendedStream("own", log),
            cuda_graphs=True,
        )
        spare = torch.empty_like(random_inputs(spec, SIZES)["ema_state"])
        average = torch.empty_like(spare)
        for seed in range(5):
            fresh = random_inputs(spec, SIZES, seed=seed)
            wanted = engine.run(fresh)
            feeds = {**fresh, "ema_state": average.copy_(fresh["ema_state"])}
            outputs = {name: torch.full_like(tensor, torch.nan) for name, tensor in wanted.items()}
            outputs["ema_state_out"] = spare
            log.clear()
            with torch.inference_mode(seed == 1):  # where the fixed buffers are made
                runs.run(feeds, outputs, call_key(spec, SIZES, feeds, {"ema_state_out": spare}))
            assert all(torch.equal(outputs[name], tensor) for name, tensor in wanted.items())
            assert log == [
                "own waits for torch",
                f"gpu_graph_id={1 if seed else -1}",
                "disable_synchronize_execution_providers=1",
                "torch waits for own",
            ]
        runs.close()
        assert log[-1] == "host waits"


def test_graphs_unused_for_longest_are_given_up_and_numbers_never_come_back(
    graph: Exported, log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three calls take turns, two graphs are kept, four may be captured; results are those without graphs."""
    import onnxruntime

    spec = graph.contract.graph
    released: list[int] = []
    with graph.engine() as engine:
        session = engine._session
        session.release_captured_graph(7)  # takes a number, and does nothing where nothing was captured
        monkeypatch.setattr(session, "release_captured_graph", released.append)
        runs = CudaRuns(
            LoggingRunOptions(onnxruntime, log),
            session,
            PretendedStream("own", log),
            cuda_graphs=True,
            kept=2,
            captured=4,
        )
        calls = []
        for rows in (1, 2, 3):
            feeds = random_inputs(spec, {**SIZES, "rows": rows + 1, "tracked": 1}, seed=rows)
            calls.append((feeds, engine.run(feeds), torch.empty_like(feeds["ema_state"])))

        def number(which: int) -> int:
            feeds, wanted, spare = calls[which]
            outputs = {name: torch.full_like(tensor, torch.nan) for name, tensor in wanted.items()}
            outputs["ema_state_out"] = spare
            sizes = spec.bind({name: tuple(tensor.shape) for name, tensor in feeds.items()})
            log.clear()
            runs.run(feeds, outputs, call_key(spec, sizes, feeds, {"ema_state_out": spare}))
            assert all(torch.equal(outputs[name], tensor) for name, tensor in wanted.items())
            return int(log[1].removeprefix("gpu_graph_id="))

        assert [number(which) for which in (0, 0, 1, 1, 0)] == [-1, 1, -1, 2, 1]
        assert [number(which) for which in (2, 2)] == [-1, 3], "the second call was unused for longest"
        assert released == [2]
        assert [number(which) for which in (0, 1, 1, 1)] == [1, -1, 4, 4], (
            "it comes again under another number"
        )
        assert released == [2, 3]
        assert [number(which) for which in (2, 2, 2, 0)] == [-1, -1, -1, 1], "no fifth graph"


def test_closing_again_waits_for_nothing(graph: Exported, log: list[str]) -> None:
    import onnxruntime

    with graph.engine() as engine:
        stream = PretendedStream("own", log)
        engine._cuda = CudaRuns(onnxruntime, engine._session, stream, cuda_graphs=True)
        engine.close()
        engine.close()
    assert log == ["host waits"]


def test_torch_waits_for_a_run_that_failed(graph: Exported, log: list[str]) -> None:
    """Its memory may be freed and used again while kernels that were launched are still at work."""
    import onnxruntime

    with graph.engine() as engine:
        runs = CudaRuns(onnxruntime, engine._session, PretendedStream("own", log), cuda_graphs=True)
        with pytest.raises(RuntimeError, match="output"):
            runs.run({"timestep": torch.zeros(2)}, {}, None)
    assert log[-1] == "torch waits for own"


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_cuda_agrees_with_torch_call_after_call(graph: Exported, cuda_graphs: bool) -> None:
    if CUDA not in available_providers():
        pytest.skip("needs onnxruntime-gpu")
    spec = graph.contract.graph
    options = OrtOptions(device="cuda", cuda_graphs=cuda_graphs)
    reference = EagerEngine(graph.fork, spec)
    with OnnxRuntimeEngine(graph.path, spec, options) as engine:
        buffers = [tensor.to(GPU) for tensor in [random_inputs(spec, SIZES)["ema_state"]] * 2]
        for seed in range(8):
            fresh = random_inputs(spec, SIZES, seed=seed)
            wanted = reference.run(fresh)
            average, spare = buffers[seed % 2], buffers[1 - seed % 2]
            average.copy_(fresh["ema_state"])
            feeds = {name: tensor.to(GPU) for name, tensor in fresh.items()}
            feeds["ema_state"] = average
            try:
                if seed > 3:  # by then both graphs have been captured, and nothing may wait
                    torch.cuda.set_sync_debug_mode("error")
                got = engine.run(feeds, out={"ema_state_out": spare})
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert got["ema_state_out"] is spare
            for name, tensor in wanted.items():
                # Float32 sums in another order, as on the CPU; TF32 is off.
                torch.testing.assert_close(got[name].cpu(), tensor, rtol=0, atol=1e-4)
