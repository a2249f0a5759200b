"""Run a plan: torch CUDA tensors in and out, one stream, no wait on the host."""

import mmap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from emag_export.contract import STATE_PAIRS, GraphSpec
from emag_export.engines.protocol import TORCH_DTYPES, allocate_outputs, check_feeds
from emag_export.engines.tensorrt.build_log import log_of
from emag_export.engines.tensorrt.flavour import Flavour
from emag_export.engines.tensorrt.graphs import CallGraphs, graph_key
from emag_export.engines.tensorrt.profiles import choose_profile
from emag_export.engines.tensorrt.store import EngineFolder, PlanRecord
from emag_export.engines.tensorrt.workspace import Workspace
from emag_export.errors import EngineError

__all__ = ["RunOptions", "StoredPlan", "TensorRTEngine"]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How engines run."""

    cuda_graphs: bool = True
    weight_budget: int | None = None
    """Bytes of weights kept on the device by a plan that streams them; None lets TensorRT choose."""


@dataclass(frozen=True, kw_only=True)
class StoredPlan:
    """A checked plan of one component."""

    component: str
    path: Path
    record: PlanRecord
    folder: EngineFolder
    graph: Callable[[], Path]
    """The ONNX file, needed where weights were left out of the plan."""


class TensorRTEngine:
    """One deserialised plan with an execution context per profile.

    Outputs are new tensors, except those given in ``out``; inputs are copied to fixed addresses when CUDA
    graphs are on, except the moving averages, which are read and written where they are.

    Args:
        plan: Checked by the store.
        spec: What the graph takes and gives.
        flavour: Which module runs it.
        workspace: Shared with the other engines of a pipeline.
        options: How it runs.

    Raises:
        EngineError: If the plan does not load on this GPU.
    """

    def __init__(
        self,
        plan: StoredPlan,
        spec: GraphSpec,
        flavour: Flavour,
        workspace: Workspace,
        options: RunOptions,
    ) -> None:
        self.spec = spec
        self.device = workspace.device
        self.name = f"{flavour.backend} ({torch.cuda.get_device_name(self.device)})"
        self._trt = flavour.load()
        self._logger, self._log = log_of(self._trt)
        self._plan, self._flavour, self._workspace = plan, flavour, workspace
        streams_weights = plan.record.options.weight_streaming
        self._use_graphs = options.cuda_graphs and not streams_weights  # streaming cannot be captured
        self._graphs = CallGraphs()
        self._staging: dict[tuple[tuple[str, int], ...], dict[str, Tensor]] = {}
        self._shaped: dict[int, tuple[dict[str, int], int]] = {}
        self._engine: Any = self._deserialise()
        if streams_weights:
            automatic = self._engine.get_weight_streaming_automatic_budget()
            self._engine.weight_streaming_budget_v2 = (
                automatic if options.weight_budget is None else options.weight_budget
            )
        self._runtime_config: Any = None
        self._contexts = [self._context(index) for index in range(len(plan.record.profiles))]
        workspace.stream.synchronize()

    def _deserialise(self) -> Any:
        self._log.clear()
        self._runtime = self._trt.Runtime(self._logger)
        with (
            self._plan.path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            engine = self._runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise self._failure(
                "cannot load", "it was built for another GPU, driver or version; rebuild: " + self._rebuild
            )
        if self._plan.record.options.strip_weights:
            self._refit(engine)
        return engine

    def _refit(self, engine: Any) -> None:
        """Put the weights, which the plan was built without, back from the ONNX file."""
        refitter = self._trt.Refitter(engine, self._logger)
        parser = self._trt.OnnxParserRefitter(refitter, self._logger)
        if not parser.refit_from_file(str(self._plan.graph())) or not refitter.refit_cuda_engine():
            raise self._failure("cannot put the weights into", "rebuild: " + self._rebuild)

    def _context(self, profile: int) -> Any:
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._flavour.captures_graphs_itself:
            if self._runtime_config is None:
                self._runtime_config = self._configure(strategy)
            context = self._engine.create_execution_context(self._runtime_config)
        else:
            context = self._engine.create_execution_context(strategy)
        stream = self._workspace.stream.cuda_stream
        if context is None or not context.set_optimization_profile_async(profile, stream):
            raise self._failure("cannot prepare", "lower --max-images, --height or --width: " + self._rebuild)
        return context

    def _configure(self, strategy: Any) -> Any:
        """Kernels compiled on this GPU by an earlier run, and CUDA graphs kept by the context itself."""
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        graphs = self._trt.CudaGraphStrategy
        config.cuda_graph_strategy = graphs.WHOLE_GRAPH_CAPTURE if self._use_graphs else graphs.DISABLED
        cache = config.create_runtime_cache()
        file = self._plan.folder.runtime_cache(self._plan.component)
        if file.is_file():
            cache.deserialize(file.read_bytes())  # refused if of another GPU or driver: compiled anew then
        config.set_runtime_cache(cache)
        return config

    def run(self, feeds: Mapping[str, Tensor], out: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """See :meth:`Engine.run`; the host does not wait for the device."""
        sizes = check_feeds(self.spec, feeds, self.device)
        profile = choose_profile(self._plan.record.profiles, sizes, rebuild=self._rebuild)
        given = dict(out or {})
        inputs = {name: tensor.contiguous() for name, tensor in feeds.items()}
        if self._use_graphs:
            staged = self._staged(sizes)
            for name in inputs.keys() - STATE_PAIRS.keys():
                inputs[name] = staged[name].copy_(inputs[name], non_blocking=True)
            outputs = allocate_outputs(
                self.spec, sizes, self.device, {**self._staged_outputs(staged), **given}
            )
        else:
            outputs = allocate_outputs(self.spec, sizes, self.device, given)
        addresses = {name: tensor.data_ptr() for name, tensor in (*inputs.items(), *outputs.items())}
        context = self._prepared(profile, sizes)
        self._workspace.begin()
        self._launch(context, sizes, addresses)
        self._workspace.end()
        if not self._use_graphs:
            return outputs
        return {name: tensor if name in given else tensor.clone() for name, tensor in outputs.items()}

    def _prepared(self, profile: int, sizes: dict[str, int]) -> Any:
        """The context of a profile, with its shapes and scratch memory set."""
        context, workspace = self._contexts[profile], self._workspace
        if self._shaped.get(profile) != (sizes, workspace.generation):
            shapes = self.spec.input_shapes(sizes)
            if not all(context.set_input_shape(name, shape) for name, shape in shapes.items()):
                raise self._failure("refused a shape in", "rebuild: " + self._rebuild)
            need = context.update_device_memory_size_for_shapes()
            try:
                context.set_device_memory(*workspace.reserve(need))
            except torch.OutOfMemoryError as error:
                raise EngineError(
                    f"{self._plan.component} needs {need / 1e9:.1f} GB of scratch memory for this call, the "
                    "GPU has less free; generate fewer or smaller pictures per call (--batch-size)"
                ) from error
            self._shaped[profile] = (dict(sizes), workspace.generation)
        return context

    def _launch(self, context: Any, sizes: dict[str, int], addresses: dict[str, int]) -> None:
        stream = self._workspace.stream

        def enqueue() -> None:
            for name, address in addresses.items():
                context.set_tensor_address(name, address)
            if not context.execute_async_v3(stream.cuda_stream):
                raise self._failure("failed in", "try --no-cuda-graphs, or rebuild: " + self._rebuild)

        if self._use_graphs and not self._flavour.captures_graphs_itself:
            self._graphs.run(graph_key(sizes, addresses, self._workspace.generation), enqueue, stream)
        else:
            enqueue()

    def _staged(self, sizes: dict[str, int]) -> dict[str, Tensor]:
        """Buffers at fixed addresses for everything but the moving averages, one set per sizes."""
        key = tuple(sorted(sizes.items()))
        if key not in self._staging:
            state = {*STATE_PAIRS, *STATE_PAIRS.values()}
            shapes = {**self.spec.input_shapes(sizes), **self.spec.output_shapes(sizes)}
            self._staging[key] = {
                tensor.name: torch.empty(
                    shapes[tensor.name], dtype=TORCH_DTYPES[tensor.dtype], device=self.device
                )
                for tensor in (*self.spec.inputs, *self.spec.outputs)
                if tensor.name not in state
            }
        return self._staging[key]

    def _staged_outputs(self, staged: dict[str, Tensor]) -> dict[str, Tensor]:
        return {tensor.name: staged[tensor.name] for tensor in self.spec.outputs if tensor.name in staged}

    def describe(self) -> str:
        """The engine inspector's JSON."""
        inspector = self._engine.create_engine_inspector()
        inspector.execution_context = self._contexts[0]
        return str(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON))

    @property
    def _rebuild(self) -> str:
        return self._plan.folder.rebuild

    def _failure(self, what: str, remedy: str) -> EngineError:
        said = "; ".join(dict.fromkeys(self._log.errors[-3:])) or "it gave no reason"
        return EngineError(f"{self._flavour.backend} {what} {self._plan.path}: {said}; {remedy}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._workspace.stream.synchronize()
        if self._runtime_config is not None:
            self._plan.folder.save_runtime_cache(
                self._plan.component, bytes(self._runtime_config.get_runtime_cache().serialize())
            )
        self._graphs.clear()
        self._staging.clear()
        del self._contexts, self._runtime_config, self._engine, self._runtime
