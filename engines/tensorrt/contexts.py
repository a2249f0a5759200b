"""Execution contexts of an engine, and what TensorRT-RTX compiled for them."""

from collections.abc import Callable
from typing import Any

from emag_export.engines.tensorrt.flavour import Flavour
from emag_export.errors import EngineError

__all__ = ["Contexts"]

Failure = Callable[[str, str], EngineError]
"""(what failed, advice) to the error that says so, with TensorRT's own words."""


class Contexts:
    """Makes execution contexts. It must live as long as they do: their configuration keeps nothing alive.

    Args:
        trt: The module.
        engine: Whose contexts.
        flavour: Which module it is.
        eager_kernels: TensorRT-RTX compiles kernels for new shapes before it first runs them. Otherwise it
            compiles while it runs others, and equal calls may differ in rounding until it is done.
        stored: Kernels that an earlier run compiled.
        failure: Makes errors.

    Raises:
        EngineError: If TensorRT-RTX refuses the configuration.
    """

    def __init__(
        self,
        trt: Any,
        engine: Any,
        flavour: Flavour,
        *,
        eager_kernels: bool = False,
        stored: bytes | None = None,
        failure: Failure,
    ) -> None:
        self._engine, self._failure = engine, failure
        self._strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self._configs: dict[bool, Any] = {}
        self._cache: Any = None
        if not flavour.captures_graphs_itself:
            return
        for repeating in (False, True):
            config = engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(self._strategy)
            graphs, kernels = trt.CudaGraphStrategy, trt.DynamicShapesKernelSpecializationStrategy
            config.cuda_graph_strategy = graphs.WHOLE_GRAPH_CAPTURE if repeating else graphs.DISABLED
            config.dynamic_shapes_kernel_specialization_strategy = (
                kernels.EAGER if eager_kernels else kernels.LAZY
            )
            if self._cache is None:
                self._cache = config.create_runtime_cache()
                if stored is not None:
                    self._cache.deserialize(stored)  # refused if of another GPU or driver: compiled anew then
            if not config.set_runtime_cache(self._cache):
                raise failure("takes no cache of kernels for", "build it again")
            self._configs[repeating] = config

    def make(self, profile: int, stream: int, *, repeating: bool) -> Any:
        """A context for one profile.

        Args:
            profile: Index.
            stream: Handle of the CUDA stream it will run on.
            repeating: It will run one call again and again, at the same addresses: TensorRT-RTX then keeps a
                CUDA graph, which it would capture anew whenever an address or a shape changed.

        Raises:
            EngineError: If it cannot be made.
        """
        what, remedy = (
            f"cannot prepare profile {profile} of",
            "lower `max_images`, `height_range` or `width_range`",
        )
        try:
            context = self._engine.create_execution_context(self._configs.get(repeating, self._strategy))
            # Some versions raise where others give False.
            if context is not None and context.set_optimization_profile_async(profile, stream):
                return context
        except Exception as error:
            raise self._failure(what, f"{error}; {remedy}") from error
        raise self._failure(what, remedy)

    def compiled(self) -> bytes | None:
        """Kernels compiled so far, those that were stored included; None where there is no such thing."""
        return None if self._cache is None else bytes(self._cache.serialize())
