"""Run one graph on the CUDA provider over the stub libraries, as a job says; in an environment of its own.

``python runner.py JOB RESULT`` with the stub libraries on ``LD_LIBRARY_PATH``. It must import nothing of this
project: its environment holds onnxruntime-gpu and no PyTorch. Memory comes from the stub CUDA runtime.
"""

import ctypes
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import onnxruntime as ort

CUDA = "CUDAExecutionProvider"


class Runtime:
    """The few functions of the stub CUDA runtime that a caller of onnxruntime needs."""

    def __init__(self, name: str) -> None:
        self._library = ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)

    def mark(self, text: str) -> None:
        """Write a line of our own into the log."""
        self._library.gpu_dry_mark(text.encode())

    def allocate(self, nbytes: int) -> int:
        """Address of new device memory."""
        return self._pointer(self._library.cudaMalloc, ctypes.c_size_t(nbytes))

    def stream(self) -> int:
        """Handle of a new stream."""
        return self._pointer(self._library.cudaStreamCreate)

    def _pointer(self, function: Any, *arguments: Any) -> int:
        pointer = ctypes.c_void_p()
        if function(ctypes.byref(pointer), *arguments) != 0 or pointer.value is None:
            raise RuntimeError(f"{function.__name__} of the stub libraries failed")
        return pointer.value


def open_session(job: dict[str, Any], stream: int, *, graphs: bool, examine: Path | None = None) -> Any:
    """A session of the job's graph with the job's options.

    ``examine`` names files for onnxruntime's profile and for the graph after its last pass.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if examine is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(examine)
        options.optimized_model_filepath = str(examine.with_suffix(".onnx"))
    provider = {**job["options"], "user_compute_stream": str(stream), "enable_cuda_graph": str(int(graphs))}
    return ort.InferenceSession(job["graph"], options, providers=[(CUDA, provider)], enable_fallback=0)


def bind(session: Any, call: dict[str, Any], buffers: dict[str, int]) -> Any:
    """Inputs and outputs of one kind of call, each ``[buffer, ONNX element type, shape]``."""
    binding = session.io_binding()
    for side, put in (("inputs", binding.bind_input), ("outputs", binding.bind_output)):
        for name, (buffer, kind, shape) in call[side].items():
            put(name, "cuda", 0, kind, shape, buffers[buffer])
    return binding


def launch(session: Any, binding: Any, graph_id: int) -> None:
    """One call, with the run options that the project gives."""
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph_id))
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    session.run_with_iobinding(binding, options)


def place(job: dict[str, Any], stream: int, buffers: dict[str, int], examine: Path) -> dict[str, int]:
    """How many nodes each provider runs, in one call of a session without CUDA graphs.

    Such a session accepts any placement.
    """
    session = open_session(job, stream, graphs=False, examine=examine)
    launch(session, bind(session, job["calls"][job["runs"][0]["call"]], buffers), -1)
    trace = Path(session.end_profiling())
    events = json.loads(trace.read_text("utf-8"))
    trace.unlink()
    return Counter(event["args"]["provider"] for event in events if event["name"].endswith("_kernel_time"))


def main() -> None:
    """Place the nodes in a session without CUDA graphs; then make the job's calls in one with them."""
    job, path = json.loads(Path(sys.argv[1]).read_text("utf-8")), Path(sys.argv[2])
    result: dict[str, Any] = {"onnxruntime": ort.__version__, "nodes": {}, "error": None}
    runtime = Runtime(job["runtime"])
    stream = runtime.stream()
    buffers = {name: runtime.allocate(nbytes) for name, nbytes in job["buffers"].items()}
    try:
        result["nodes"] = place(job, stream, buffers, path)
        session = open_session(job, stream, graphs=True)
        bindings = {name: bind(session, call, buffers) for name, call in job["calls"].items()}
        for run in job["runs"]:
            runtime.mark(f"{run['kind']} call={run['call']} id={run['id']}")
            launch(session, bindings[run["call"]], run["id"])
        runtime.mark("end")
    except Exception as error:  # onnxruntime's errors share no narrower class
        result["error"] = str(error)
    path.write_text(json.dumps(result, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
