"""TensorRT's runtime objects on the host: they compute, and refuse what the documentation forbids.

Only methods of the real classes are public here; ``tests/test_tensorrt_runner.py`` holds that.
"""

import ctypes
from collections.abc import Callable
from math import prod
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from emag_export.contract import GraphSpec, TensorSpec
from emag_export.engines.tensorrt.workspace import Workspace

SPEC = GraphSpec(
    name="transformer",
    inputs=(
        TensorSpec(name="x", dtype="float32", dims=("rows", "w")),
        TensorSpec(name="ema_state", dtype="float32", dims=("tracked", "w")),
    ),
    outputs=(
        TensorSpec(name="y", dtype="float32", dims=("rows", "w")),
        TensorSpec(name="ema_state_out", dtype="float32", dims=("tracked", "w")),
    ),
)
"""What the double computes: ``y = 2 x`` and ``ema_state_out = ema_state + x's first rows``."""


def at(address: int, shape: tuple[int, ...]) -> Tensor:
    """The float32 tensor at an address of the host."""
    return torch.frombuffer(
        (ctypes.c_char * (4 * prod(shape))).from_address(address), dtype=torch.float32
    ).view(shape)


class HostStream:
    """Stands for a CUDA stream."""

    cuda_stream = 94

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def synchronize(self) -> None:
        self.log.append("host waits")


class HostWorkspace(Workspace):
    """The real one but for its stream."""

    def __init__(self, log: list[str]) -> None:
        self.device, self.generation, self._block = torch.device("cpu"), 0, None
        self.stream: Any = HostStream(log)
        self.log = log

    def begin(self) -> None:
        self.log.append("begin")

    def end(self) -> None:
        self.log.append("end")


class HostGraph:
    """Stands for torch.cuda.CUDAGraph: what is enqueued while it captures is kept, not run."""

    capturing: "HostGraph | None" = None
    ending_fails = False

    def __init__(self) -> None:
        self.work: list[Callable[[], None]] = []

    def capture_begin(self, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local"
        assert HostGraph.capturing is None
        HostGraph.capturing = self

    def capture_end(self) -> None:
        HostGraph.capturing = None
        if HostGraph.ending_fails:
            raise RuntimeError("operation failed due to a previous error during capture")

    def replay(self) -> None:
        for run in self.work:
            run()


class Cache:
    """IRuntimeCache; what it holds is a list of names."""

    def __init__(self) -> None:
        self.held = b""

    def serialize(self) -> bytes:
        return self.held

    def deserialize(self, blob: bytes) -> bool:
        if not blob.startswith(b"kernels"):
            return False
        self.held = blob
        return True


class Config:
    """IRuntimeConfig: it keeps nothing alive that it is given."""

    def __init__(self) -> None:
        self.cuda_graph_strategy: Any = None
        self.dynamic_shapes_kernel_specialization_strategy: Any = None
        self._cache: Any = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        assert strategy.name == "USER_MANAGED"

    def create_runtime_cache(self) -> Cache:
        return Cache()

    def set_runtime_cache(self, cache: Cache) -> bool:
        self._cache = ref(cache)
        return True


class Context:
    """IExecutionContext."""

    def __init__(self, engine: "Engine", config: Any) -> None:
        self._engine, self._config = engine, config
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._memory: tuple[int, int] = (0, 0)
        self._ran: Any = None
        self.runs = 0

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._engine.log.append(f"profile {profile_index}")
        if self._engine.profile_refusal is not None:
            raise self._engine.profile_refusal
        return self._engine.accepts_profiles

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shapes[name] = shape
        return self._engine.accepts_shapes

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return memory % 256 == 0

    def update_device_memory_size_for_shapes(self) -> int:
        return self._need()

    def set_device_memory(self, memory: int, size: int) -> None:
        assert memory % 256 == 0
        self._memory = (memory, size)

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert self._memory[1] >= self._need(), "less scratch memory than these shapes need"
        shapes, addresses, before = dict(self._shapes), dict(self._addresses), self._ran
        if HostGraph.capturing is not None:
            assert before == (shapes, self._memory), (
                "captured without a run with these shapes and this memory"
            )
            if self._engine.capture_fails:
                return False
            HostGraph.capturing.work.append(lambda: self._compute(shapes, addresses))
            return True
        self._engine.log.append(f"run {shapes['x']}")
        self._ran = (shapes, self._memory)
        self._compute(shapes, addresses)
        return True

    def _compute(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        x, state = (at(addresses[name], shapes[name]) for name in ("x", "ema_state"))
        at(addresses["y"], shapes["x"]).copy_(2 * x)
        at(addresses["ema_state_out"], shapes["ema_state"]).copy_(state + x[: len(state)])
        if self._config is not None and self._config._cache is not None:
            cache = self._config._cache()
            assert cache is not None, "the cache of kernels ended before the context"
            cache.held = b"kernels " + b",".join(
                sorted({*cache.held[8:].split(b","), b"%d" % len(x)} - {b""})
            )

    def _need(self) -> int:
        return 1024 * self._shapes["x"][0]


class Engine:
    """ICudaEngine."""

    def __init__(self, log: list[str]) -> None:
        self.log = log
        self.configs: list[Config] = []
        self.contexts: list[Context] = []
        self.accepts_shapes = self.accepts_profiles = True
        self.profile_refusal: Exception | None = None
        self.capture_fails = False

    def create_runtime_config(self) -> Config:
        self.configs.append(Config())
        return self.configs[-1]

    def create_execution_context(self, strategy: Any) -> Context:
        config = strategy if isinstance(strategy, Config) else None
        self.contexts.append(Context(self, config))
        return self.contexts[-1]
