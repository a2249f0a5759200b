"""The dry run of onnxruntime's CUDA provider: its stub libraries, and what is read from their log.

``make gpu-dry`` itself needs a download of 256 MB and is no part of this.
"""

import ctypes
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper

from benchmarks.gpu_dry.copies import inserted_copies
from benchmarks.gpu_dry.graphs import DryGraph
from benchmarks.gpu_dry.job import RUNS, describe
from benchmarks.gpu_dry.judge import judge, read_log
from benchmarks.gpu_dry.stub_libraries import CUDA_RUNTIME, build_libraries, needed_symbols
from emag_export.engines.ort_providers import CUDA, provider_options
from emag_export.errors import MissingDependencyError
from emag_export.kinds import Variant
from tests.conftest import small_fork

needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc to compile stub libraries")

UNSUPPORTED, INVALIDATED = 900, 901
"""``cudaErrorStreamCaptureUnsupported`` and ``cudaErrorStreamCaptureInvalidated``."""


class Dim3(ctypes.Structure):
    """CUDA's sizes of grids and blocks, given by value."""

    _fields_ = (("x", ctypes.c_uint), ("y", ctypes.c_uint), ("z", ctypes.c_uint))


class Stub:
    """Stub libraries in this process, and the lines they log."""

    def __init__(self, folder: Path, log: Path) -> None:
        self.runtime = ctypes.CDLL(str(folder / CUDA_RUNTIME))
        self.cublas = ctypes.CDLL(str(folder / "libcublas.so.13"))
        self._log = log

    def new(self, function: str, *arguments: object) -> ctypes.c_void_p:
        """What a function that fills in a pointer gives."""
        pointer = ctypes.c_void_p()
        assert self.runtime[function](ctypes.byref(pointer), *arguments) == 0
        return pointer

    def lines(self) -> list[str]:
        """Logged since the last call, addresses replaced."""
        text = self._log.read_text("utf-8")
        self._log.write_text("", "utf-8")
        return [re.sub(r"(?<==)(0x[0-9a-f]+|\(nil\))", "P", line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stub]:
    folder = tmp_path_factory.mktemp("stub")
    runtime = ("cudaMalloc", "cudaMemPoolTrimTo", "cudaMemPoolGetAttribute")
    cublas = ("cublasSgemm_v2", "cublasLtMatmulDescCreate")
    build_libraries(folder, {CUDA_RUNTIME: runtime, "libcublas.so.13": cublas})
    log = folder / "log.txt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPU_DRY_LOG", str(log))
        log.touch()
        yield Stub(folder, log)


@pytest.fixture
def stub(built: Stub) -> Stub:
    built.lines()
    return built


@needs_gcc
def test_memory_holds_bytes_and_copies_name_both_ends(stub: Stub) -> None:
    device = stub.new("cudaMalloc", ctypes.c_size_t(16))
    pinned = stub.new("cudaHostAlloc", ctypes.c_size_t(16), 0)
    stream = stub.new("cudaStreamCreate")
    sixteen, result = ctypes.c_size_t(16), ctypes.create_string_buffer(16)
    assert stub.runtime.cudaMemcpyAsync(device, b"sixteen bytes ok", sixteen, 1, stream) == 0
    assert stub.runtime.cudaMemcpyAsync(pinned, device, sixteen, 2, stream) == 0
    assert stub.runtime.cudaMemcpy(result, pinned, sixteen, 0) == 0
    assert result.raw == b"sixteen bytes ok"
    assert stub.runtime.cudaFree(device) == stub.runtime.cudaFreeHost(pinned) == 0
    assert stub.lines() == [
        "malloc kind=device bytes=16 address=P",
        "malloc kind=pinned bytes=16 address=P",
        "create-stream stream=P",
        "copy from=pageable to=device bytes=16 how=async stream=P",
        "copy from=device to=pinned bytes=16 how=async stream=P",
        "copy from=pinned to=pageable bytes=16 how=sync stream=P",
        "free kind=device bytes=16 address=P",
        "free kind=pinned bytes=16 address=P",
    ]


@needs_gcc
def test_a_capture_counts_what_it_holds_and_is_launched_by_number(stub: Stub) -> None:
    runtime, stream = stub.runtime, stub.new("cudaStreamCreate")
    runtime.__cudaRegisterFunction(None, ctypes.c_void_p(1234), b"device", b"_Z4add1Pf")
    assert runtime.cudaStreamBeginCapture(stream, 0) == 0
    launch = (Dim3(3, 1, 1), Dim3(256, 1, 1), None, ctypes.c_size_t(0))
    assert runtime.cudaLaunchKernel(ctypes.c_void_p(1234), *launch, stream) == 0
    assert runtime.cudaLaunchKernel(ctypes.c_void_p(1234), *launch, None) == 0  # elsewhere: not in the graph
    status, graph = ctypes.c_int(), ctypes.c_void_p()
    assert runtime.cudaStreamIsCapturing(stream, ctypes.byref(status)) == 0
    assert status.value == 1
    assert runtime.cudaStreamEndCapture(stream, ctypes.byref(graph)) == 0
    instance = stub.new("cudaGraphInstantiate", graph, ctypes.c_ulonglong(0))
    assert runtime.cudaGraphLaunch(instance, stream) == 0
    kernel = "kernel name=_Z4add1Pf grid=3,1,1 block=256,1,1 stream=P"
    lines = stub.lines()
    number = lines[-1].split()[1]
    assert lines == [
        "create-stream stream=P",
        "begin-capture stream=P mode=0",
        kernel,
        kernel,
        f"end-capture stream=P {number} nodes=1",
        f"instantiate {number}",
        f"launch-graph {number} nodes=1 stream=P",
    ]


@needs_gcc
@pytest.mark.parametrize(
    ("function", "arguments", "line"),
    [
        ("cudaMalloc", (ctypes.c_size_t(8),), "malloc kind=device bytes=8 refused=1"),
        ("cudaMallocHost", (ctypes.c_size_t(8),), "malloc kind=pinned bytes=8 refused=1"),
        ("cudaFree", (), "free kind=device address=P refused=1"),
        (
            "cudaMemcpy",
            (b"1", ctypes.c_size_t(1), 1),
            "copy from=pageable to=pageable bytes=1 how=sync refused=1",
        ),
        ("cudaMemset", (0, ctypes.c_size_t(1)), "fill bytes=1 how=sync refused=1"),
        ("cudaStreamSynchronize", (), "synchronize what=stream refused=1"),
        ("cudaDeviceSynchronize", (), "synchronize what=device refused=1"),
    ],
)
def test_what_cuda_refuses_during_a_capture_spoils_it(
    stub: Stub, function: str, arguments: tuple[object, ...], line: str
) -> None:
    """In CUDA's global capture mode (CUDA C++ Programming Guide, stream capture)."""
    stream, graph, place = stub.new("cudaStreamCreate"), ctypes.c_void_p(1), ctypes.create_string_buffer(8)
    stub.runtime.cudaStreamBeginCapture(stream, 0)
    assert stub.runtime[function](place, *arguments) == UNSUPPORTED
    assert stub.runtime.cudaGetLastError() == UNSUPPORTED
    assert stub.runtime.cudaStreamEndCapture(stream, ctypes.byref(graph)) == INVALIDATED
    assert graph.value is None
    assert stub.lines()[2:] == [line, "end-capture stream=P refused=1"]
    assert stub.runtime.cudaDeviceSynchronize() == 0, "the capture is over"


@needs_gcc
def test_functions_that_nobody_wrote_are_generated(stub: Stub) -> None:
    handle, descriptor = ctypes.c_void_p(), ctypes.c_void_p()
    assert stub.cublas.cublasCreate_v2(ctypes.byref(handle)) == 0
    assert stub.cublas.cublasSetStream_v2(handle, ctypes.c_void_p(0xABC)) == 0
    assert stub.cublas.cublasSgemm_v2(handle) == 0
    assert stub.cublas.cublasLtMatmulDescCreate(ctypes.byref(descriptor)) == 0
    assert descriptor.value is not None
    assert stub.runtime.cudaMemPoolTrimTo(None, ctypes.c_size_t(0)) == 0
    assert stub.runtime.cudaMemPoolGetAttribute(None, 0, None) != 0, "it would have to fill in something"
    assert stub.lines() == [
        "call name=cublasSgemm_v2 stream=P",
        "call name=cublasLtMatmulDescCreate",
        "call name=cudaMemPoolTrimTo",
        "call name=cudaMemPoolGetAttribute",
    ]


@needs_gcc
def test_needed_functions_are_read_from_the_provider(tmp_path: Path) -> None:
    build_libraries(tmp_path, {CUDA_RUNTIME: (), "libcuda.so.1": ("cuTensorMapEncodeTiled",)})
    source, library = tmp_path / "provider.c", tmp_path / "provider.so"
    source.write_text(
        "int cudaMalloc(void); int cuTensorMapEncodeTiled(void);\n"
        'const char *const names[] = {"cudnnCreate", "cudnnSetStream", "not a cudnnName"};\n'
        "int use(void) { return cudaMalloc() + cuTensorMapEncodeTiled(); }\n"
    )
    libraries = (f"-L{tmp_path}", f"-l:{CUDA_RUNTIME}", "-l:libcuda.so.1")
    subprocess.run(("gcc", "-shared", "-fPIC", source, "-o", library, *libraries), check=True)
    assert needed_symbols(library) == {
        CUDA_RUNTIME: {"cudaMalloc"},
        "libcuda.so.1": {"cuTensorMapEncodeTiled"},
        "libcudnn.so.9": {"cudnnCreate", "cudnnSetStream", "cudnnName"},
    }


def test_a_missing_compiler_is_named_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingDependencyError, match=r"gcc.* is not installed: apt install gcc$"):
        build_libraries(tmp_path / "libraries", {})


GOOD = """\
malloc kind=device bytes=64 address=0x1
mark plain call=guide a>b id=-1
malloc kind=device bytes=64 address=0x2
kernel name=_Z3addv grid=1,1,1 block=1,1,1 stream=0x9
mark capture call=guide a>b id=1
kernel name=_Z3addv grid=1,1,1 block=1,1,1 stream=0x9
synchronize what=stream
begin-capture stream=0x9 mode=0
kernel name=_Z3addv grid=1,1,1 block=1,1,1 stream=0x9
call name=cublasSgemm_v2 stream=0x9
copy from=device to=device bytes=4 how=async stream=0x9
end-capture stream=0x9 graph=1 nodes=2
instantiate graph=1
launch-graph graph=1 nodes=2 stream=0x9
mark replay call=guide a>b id=1
launch-graph graph=1 nodes=2 stream=0x9
mark end
free kind=device bytes=64 address=0x1
"""
"""Recorded from a small graph and shortened."""

INSIDE = "copy from=device to=device bytes=4 how=async stream=0x9\n"
REPLAY = "mark replay call=guide a>b id=1\n"
PLAIN = "malloc kind=device bytes=64 address=0x2\n"
LAUNCH = "launch-graph graph=1 nodes=2 stream=0x9\n"


def test_a_good_log_is_passed_and_read_by_calls() -> None:
    calls = read_log(GOOD)
    assert [(call.kind, call.name, call.number) for call in calls] == [
        ("plain", "guide a>b", -1),
        ("capture", "guide a>b", 1),
        ("replay", "guide a>b", 1),
    ]
    assert [event.name for event in calls[1].captured] == ["kernel", "call", "copy"]
    assert calls[0].captured == ()
    assert judge(calls) == []


@pytest.mark.parametrize(
    ("behind", "line", "wrong"),
    [
        (INSIDE, "malloc kind=device bytes=4 refused=1", "capture .* cannot be captured: malloc"),
        (INSIDE, "free kind=device bytes=4 address=0x2", "capture .* cannot be captured: free"),
        (INSIDE, "synchronize what=stream refused=1", "capture .* cannot be captured: synchronize"),
        (INSIDE, "host-function stream=0x9", "capture .* cannot be captured: host-function"),
        (
            INSIDE,
            INSIDE.replace("from=device", "from=pinned"),
            "capture .* host and device: copy from=pinned",
        ),
        (INSIDE, INSIDE.replace("to=device", "to=pageable"), "capture .* host and device: .* to=pageable"),
        (INSIDE, INSIDE.replace("0x9", "0x8"), "capture .* in a stream that is not captured: copy"),
        (INSIDE, "call name=cublasSgemm_v2 stream=(nil)", "capture .* not captured: call name=cublasSgemm"),
        (INSIDE, "call name=cudaMemcpyFromSymbol", "capture .* host and device: call"),
        (LAUNCH, LAUNCH, "capture .* made and launched; made: .'1'., launched: .'1', '1'."),
        (REPLAY, "malloc kind=device bytes=4 address=0x3", "replay .* unexpected malloc"),
        (REPLAY, "kernel name=_Z3addv stream=0x9", "replay .* unexpected kernel"),
        (REPLAY, "synchronize what=stream", "replay .* unexpected synchronize"),
        (REPLAY, LAUNCH, "replay .* launched once; launched: .'1', '1'."),
        (PLAIN, "synchronize what=device", "plain .* the host waits"),
        (PLAIN, "copy from=device to=pinned bytes=4 how=async stream=0x9", "plain .* host and device"),
        (PLAIN, "launch-graph graph=1 nodes=2 stream=0x9", "plain .* unexpected launch-graph"),
    ],
)
def test_each_violation_is_found(behind: str, line: str, wrong: str) -> None:
    log = GOOD.replace(behind, f"{behind}{line.strip()}\n", 1)
    (found,) = judge(read_log(log))
    assert re.match(wrong, found), found


@pytest.mark.parametrize(
    ("old", "new", "wrong"),
    [
        (REPLAY + LAUNCH, REPLAY, ["graph 1 was to be launched once; launched: []"]),
        (REPLAY + LAUNCH, REPLAY + LAUNCH.replace("=1", "=2"), ["graph 1 was to be launched once"]),
        (REPLAY, REPLAY.replace("id=1", "id=2"), ["graph None was to be launched once"]),
        (
            re.search("begin-capture(.*\n)*?(?=end-capture)", GOOD)[0],  # type: ignore[index]
            "begin-capture stream=0x9 mode=0\n",
            ["nothing was captured"],
        ),
        (
            re.search("begin-capture(.*\n)*?launch-graph.*\n(?=mark)", GOOD)[0],  # type: ignore[index]
            "",
            ["one new graph was to be made", "nothing was captured", "graph None"],
        ),
        (
            GOOD[GOOD.index("mark replay") :],
            GOOD[GOOD.index("mark capture") : GOOD.index("mark replay")],
            ["one new graph was to be made", "captured again; graph 1 was made for this id"],
        ),
    ],
)
def test_graphs_that_are_missing_or_mixed_up_are_found(old: str, new: str, wrong: list[str]) -> None:
    assert old in GOOD
    found = judge(read_log(GOOD.replace(old, new)))
    assert len(found) == len(wrong)
    assert all(text in sentence for text, sentence in zip(wrong, found, strict=True)), found


def test_inserted_copies_name_the_nodes_they_join(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["size"], name="measure"),
        helper.make_node("MemcpyFromHost", ["size"], ["size_gpu"], name="Memcpy"),
        helper.make_node("Add", ["size_gpu", "n"], ["y"], name="add"),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.INT64, [1]) for name in ("x", "n", "y")]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", ends[:2], ends[2:])), tmp_path / "g.onnx")
    assert inserted_copies(tmp_path / "g.onnx") == ["MemcpyFromHost of size, from measure to add"]


def test_a_job_takes_turns_with_two_buffers_of_averages() -> None:
    contract = small_fork("sd3", Variant.EMAG_Q).contract
    job = describe(DryGraph(name="g", path=Path("g.onnx"), spec=contract.graph))
    first, second = job["calls"]["guide a>b"], job["calls"]["guide b>a"]
    assert first["inputs"]["ema_state"] == second["outputs"]["ema_state_out"]
    assert second["inputs"]["ema_state"] == first["outputs"]["ema_state_out"]
    assert first["inputs"]["ema_state"] != second["inputs"]["ema_state"]
    assert first["inputs"]["timestep"] == second["inputs"]["timestep"] == ["guide timestep", 1, [2]]
    assert job["buffers"]["guide timestep"] == 8
    assert job["options"] == provider_options(CUDA, torch.device("cuda", 0), 0, cuda_graphs=True)
    assert {run["call"] for run in job["runs"]} <= set(job["calls"])
    captured = [number for kind, _, number in RUNS if kind == "capture"]
    assert len(captured) == len(set(captured)) == 4
