"""Run a plan: torch CUDA tensors in and out, one stream, no wait on the host."""

import mmap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from emag_export.contract import STATE_PAIRS, GraphSpec
from emag_export.engines.protocol import TORCH_DTYPES, allocate_outputs, check_feeds
from emag_export.engines.repeats import CallKey, Repeats, call_key
from emag_export.engines.tensorrt.build_log import log_of
from emag_export.engines.tensorrt.contexts import Contexts
from emag_export.engines.tensorrt.flavour import Flavour
from emag_export.engines.tensorrt.graphs import capture
from emag_export.engines.tensorrt.profiles import choose_profile
from emag_export.engines.tensorrt.store import EngineFolder, PlanRecord
from emag_export.engines.tensorrt.streaming import automatic_budget, set_budget
from emag_export.engines.tensorrt.workspace import Workspace, empty_aligned, is_aligned
from emag_export.errors import Call, EngineError

__all__ = ["RunOptions", "StoredPlan", "TensorRTEngine"]

_REPEATS = 16
"""Calls that get a context of their own; a run of one batch has four: two phases, and two state buffers that
take turns."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How engines run."""

    cuda_graphs: bool = True
    weight_budget: int | None = None
    """Bytes of weights kept on the device by a plan that streams them; None is what fits."""
    eager_kernels: bool = False
    """TensorRT-RTX compiles kernels for new shapes before it first runs them, not while it runs others: the
    first call of a kind takes longer, and equal calls give equal results from the first one on."""


@dataclass(frozen=True, kw_only=True)
class StoredPlan:
    """A checked plan of one component."""

    component: str
    path: Path
    record: PlanRecord
    folder: EngineFolder
    graph: Callable[[], Path]
    """The ONNX file, needed where weights were left out of the plan."""


@dataclass(kw_only=True)
class _Call:
    """An execution context, and what it was last set up for."""

    context: Any
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    """Fixed addresses of all but the averages, for a call that repeats; empty for a context of any call."""
    sizes: Mapping[str, int] | None = None
    generation: int = -1
    """Of the scratch memory."""
    graph: Any = None
    """A ``torch.cuda.CUDAGraph`` once it is captured, where TensorRT keeps none itself."""


class TensorRTEngine:
    """One deserialised plan with an execution context per profile, for calls of any size.

    With CUDA graphs, a call that comes again, with the same sizes and the same buffers of averages, gets a
    context of its own, whose shapes and addresses never change: inputs and outputs other than the averages
    are copied to and from fixed buffers. It runs once, is captured right after, and replayed from then on.

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
        self._engine: Any = self._deserialise()
        streams_weights = plan.record.options.weight_streaming
        if streams_weights:
            self._keep_weights(options.weight_budget)
        kernels = plan.folder.runtime_cache(plan.component)
        self._contexts = Contexts(
            self._trt,
            self._engine,
            flavour,
            eager_kernels=options.eager_kernels,
            stored=kernels.read_bytes() if kernels.is_file() else None,
            failure=lambda what, advice: self._failure(what, advice, rebuild=True),
        )
        stream = workspace.stream.cuda_stream
        self._calls = [
            _Call(context=self._contexts.make(profile, stream, repeating=False))
            for profile in range(len(plan.record.profiles))
        ]
        captures = options.cuda_graphs and not streams_weights  # streaming cannot be captured
        self._repeats: Repeats[_Call] = Repeats(_REPEATS if captures else 0, self._drop)
        workspace.stream.synchronize()

    def _deserialise(self) -> Any:
        self._log.clear()
        self._runtime = self._trt.Runtime(self._logger)
        if self._plan.record.options.version_compatible:
            # Such a plan brings a runtime of its own, which is code; its SHA-256 was checked.
            self._runtime.engine_host_code_allowed = True
        with (
            self._plan.path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            engine = self._runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise self._failure(
                "cannot load", "it was built for another GPU, driver or version; build it again", rebuild=True
            )
        if self._plan.record.options.strip_weights:
            self._refit(engine)
        return engine

    def _refit(self, engine: Any) -> None:
        """Put the weights, which the plan was built without, back from the ONNX file."""
        refitter = self._trt.Refitter(engine, self._logger)
        parser = self._trt.OnnxParserRefitter(refitter, self._logger)
        if not parser.refit_from_file(str(self._plan.graph())) or not refitter.refit_cuda_engine():
            raise self._failure("cannot put the weights into", "build it again", rebuild=True)

    def _keep_weights(self, budget: int | None) -> None:
        if budget is None:
            self._engine.weight_streaming_budget_v2 = 0
            sizes = {name: size.max for name, size in self._plan.record.profiles[-1].items()}
            reserved = sum(tensor.nbytes(sizes) for tensor in (*self.spec.inputs, *self.spec.outputs))
            budget = automatic_budget(self._engine, torch.cuda.mem_get_info(self.device)[0], reserved)
        set_budget(self._engine, budget)

    def run(self, feeds: Mapping[str, Tensor], out: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """See :meth:`Engine.run`; the host does not wait for the device."""
        sizes = check_feeds(self.spec, feeds, self.device)
        profile = choose_profile(self._plan.record.profiles, sizes, rebuild=self._rebuild)
        try:
            results = allocate_outputs(self.spec, sizes, self.device, out)
            key = self._key(sizes, feeds, out)
            call = self._repeats.get(key, lambda: self._repeated(profile, sizes)) or self._calls[profile]
            # In inference mode buffers of callers who are and who are not can both be written to.
            with torch.inference_mode():
                self._run(call, sizes, feeds, results)
        except torch.OutOfMemoryError as error:
            raise EngineError(
                f"{self.name} ran out of device memory in {self._plan.component}; generate fewer or smaller "
                f"pictures per call (`batch_size`), or end other programs on this GPU: {error}"
            ) from error
        return results

    def _key(
        self, sizes: Mapping[str, int], feeds: Mapping[str, Tensor], out: Mapping[str, Tensor] | None
    ) -> CallKey | None:
        key = call_key(self.spec, sizes, feeds, out)
        return key if key is not None and all(map(is_aligned, key[1])) else None

    def _repeated(self, profile: int, sizes: Mapping[str, int]) -> _Call:
        state = {*STATE_PAIRS, *STATE_PAIRS.values()}
        shapes = {**self.spec.input_shapes(sizes), **self.spec.output_shapes(sizes)}
        # A buffer born in inference mode could not be written to by a caller who is not.
        with torch.inference_mode(False):
            buffers = {
                tensor.name: empty_aligned(shapes[tensor.name], TORCH_DTYPES[tensor.dtype], self.device)
                for tensor in (*self.spec.inputs, *self.spec.outputs)
                if tensor.name not in state
            }
        stream = self._workspace.stream.cuda_stream
        return _Call(context=self._contexts.make(profile, stream, repeating=True), buffers=buffers)

    def _drop(self, call: _Call) -> None:
        """A context must not end while it runs; this is the one wait, and calls that repeat cause none."""
        self._workspace.stream.synchronize()

    def _run(
        self,
        call: _Call,
        sizes: Mapping[str, int],
        feeds: Mapping[str, Tensor],
        results: Mapping[str, Tensor],
    ) -> None:
        bound = {}
        for name, tensor in feeds.items():
            if name in call.buffers or not (tensor.is_contiguous() and is_aligned(tensor.data_ptr())):
                bound[name] = self._buffer(call, name, tensor).copy_(tensor, non_blocking=True)
            else:
                bound[name] = tensor
        for name, tensor in results.items():
            fits = name not in call.buffers and is_aligned(tensor.data_ptr())
            bound[name] = tensor if fits else self._buffer(call, name, tensor)
        self._workspace.begin()
        try:
            self._launch(call, sizes, {name: tensor.data_ptr() for name, tensor in bound.items()})
        finally:  # memory may be freed and used again while kernels that were launched are still at work
            self._workspace.end()
        for name, tensor in results.items():
            if bound[name] is not tensor:
                tensor.copy_(bound[name], non_blocking=True)

    def _buffer(self, call: _Call, name: str, like: Tensor) -> Tensor:
        fixed = call.buffers.get(name)
        return empty_aligned(tuple(like.shape), like.dtype, self.device) if fixed is None else fixed

    def _launch(self, call: _Call, sizes: Mapping[str, int], addresses: Mapping[str, int]) -> None:
        stream = self._workspace.stream

        def enqueue() -> None:
            for name, address in addresses.items():
                if not call.context.set_tensor_address(name, address):
                    raise self._failure(f"refused the address of {name} in", "report it")
            if not call.context.execute_async_v3(stream.cuda_stream):
                raise self._failure("failed in", "turn off `cuda_graphs`, or build it again", rebuild=True)

        if call.graph is not None and call.generation == self._workspace.generation:
            with torch.cuda.stream(stream):
                call.graph.replay()
            return
        call.graph = None
        self._prepare(call, sizes)
        enqueue()
        if call.buffers and not self._flavour.captures_graphs_itself:
            try:
                call.graph = capture(enqueue, stream)
            except RuntimeError as error:
                raise self._failure("cannot capture a call of", f"{error}; turn off `cuda_graphs`") from error

    def _prepare(self, call: _Call, sizes: Mapping[str, int]) -> None:
        """Set shapes and scratch memory of a context, where they are not."""
        workspace = self._workspace
        if (call.sizes, call.generation) == (sizes, workspace.generation):
            return
        call.sizes = None  # if anything below fails, nothing is known of this context
        for name, shape in self.spec.input_shapes(sizes).items():
            if not call.context.set_input_shape(name, shape):
                raise self._failure(f"refused {name} of shape {shape} in", "build it again", rebuild=True)
        need = call.context.update_device_memory_size_for_shapes()
        call.context.set_device_memory(*workspace.reserve(need))
        call.sizes, call.generation = dict(sizes), workspace.generation

    def describe(self) -> str:
        """The engine inspector's JSON."""
        inspector = self._engine.create_engine_inspector()
        inspector.execution_context = self._calls[0].context
        return str(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON))

    @property
    def _rebuild(self) -> Call:
        return self._plan.folder.rebuild

    def _failure(self, what: str, advice: str, *, rebuild: bool = False) -> EngineError:
        said = "; ".join(dict.fromkeys(self._log.errors[-3:])) or "it gave no reason"
        text = f"{self._flavour.backend} {what} {self._plan.path}: {said}; {advice}"
        return EngineError(text, remedy=self._rebuild if rebuild else None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the engine and keep what was compiled for it; closing twice does nothing."""
        if not hasattr(self, "_engine"):
            return
        self._workspace.stream.synchronize()
        compiled = self._contexts.compiled()
        if compiled is not None:
            self._plan.folder.save_runtime_cache(self._plan.component, compiled)
        self._repeats.clear()
        self._calls.clear()
        del self._contexts, self._engine, self._runtime
